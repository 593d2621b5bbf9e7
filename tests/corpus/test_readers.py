"""Documents from every format and kind of row, and the file and line of every mistake."""

import gzip
import json

import pytest

from lorabatch.corpus.readers import Document, numbered_lines, read_documents, rows
from lorabatch.errors import DataError


@pytest.fixture
def make(tmp_path):
    """Write a file and return its path."""

    def write(name, content):
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8"))
        return path

    return write


def texts(documents):
    return [d.text for d in documents]


def lines(documents):
    return [int(d.where.rsplit(":", 1)[1]) for d in documents]


# .txt


@pytest.mark.parametrize(
    ("content", "expected", "at"),
    [
        ("one\ntwo\nthree", ["one", "two", "three"], [1, 2, 3]),
        ("one\ntwo\n", ["one", "two"], [1, 2]),
        # blank lines only around: still one a line
        ("\n\n  one \ntwo\t\n\n\n", ["one", "two"], [3, 4]),
        ("one\ntwo\n\nthree\n", ["one\ntwo", "three"], [1, 4]),
        ("one\n \t \ntwo", ["one", "two"], [1, 3]),  # a line of spaces is blank
        # indentation inside a block stays
        ("\none\n\n\n\n  two\nthree\n", ["one", "  two\nthree"], [2, 6]),
        ("único", ["único"], [1]),
    ],
)
def test_lines_or_blocks_are_detected(make, content, expected, at):
    documents = read_documents(make("a.txt", content))
    assert texts(documents) == expected
    assert lines(documents) == at
    assert all(d.prompt is None and d.messages is None for d in documents)


def test_the_asked_layout_wins(make):
    path = make("a.txt", "one\ntwo\n\nthree\n")
    assert texts(read_documents(path, txt_format="line")) == ["one", "two", "three"]
    assert texts(read_documents(path, txt_format="blank")) == ["one\ntwo", "three"]
    assert texts(read_documents(make("b.txt", "one\ntwo"), txt_format="blank")) == ["one\ntwo"]


@pytest.mark.parametrize("name", ["a.txt", "A.TXT"])
@pytest.mark.parametrize("prefix", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_byte_order_mark_and_windows_line_ends_leave_no_trace(make, name, prefix, newline):
    content = prefix + newline.join(["olá", "two", "", "three", ""]).encode()
    documents = read_documents(make(name, content))
    assert texts(documents) == ["olá\ntwo", "three"]
    assert lines(documents) == [1, 4]
    assert texts(read_documents(make(name, content), txt_format="line")) == ["olá", "two", "three"]


@pytest.mark.parametrize(
    "mark",
    ["\f", "\u2028", "\x85", "\x1c"],
    ids=["form-feed", "line-separator", "next-line", "file-separator"],
)
def test_only_newlines_end_a_line(make, mark):
    """A form feed (pdftotext writes one a page) neither ends a document nor shifts the line
    numbers."""
    documents = read_documents(make("a.txt", f"one\n{mark}two a{mark}b\nthree\n"))
    assert len(documents) == 3
    assert lines(documents) == [1, 2, 3]
    assert texts(documents)[2] == "three"


# .jsonl


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"text": " a b "}, Document(" a b ", "")),
        ({"prompt": "p", "completion": " c"}, Document(" c", "", prompt="p")),
        ({"question": "q?", "answer": "a"}, Document(" a", "", prompt="Question: q?\nAnswer:")),
        (
            {"messages": [{"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}]},
            Document(
                "",
                "",
                messages=({"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}),
            ),
        ),
        # plain text comes first
        ({"text": "t", "prompt": "p", "completion": "c", "other": 1}, Document("t", "")),
        (
            {"prompt": "p", "completion": "c", "question": "q", "answer": "a"},
            Document("c", "", prompt="p"),
        ),
    ],
)
def test_every_kind_of_row(make, row, expected):
    path = make("a.jsonl", json.dumps(row) + "\n")
    (document,) = read_documents(path)
    assert document == Document(expected.text, f"{path}:1", expected.prompt, expected.messages)


def test_text_field_can_be_named(make):
    path = make("a.jsonl", '{"body": "b", "text": "t"}\n')
    assert texts(read_documents(path, text_field="body")) == ["b"]
    assert texts(read_documents(path)) == ["t"]


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_blank_lines_count_but_hold_nothing(make, newline):
    rows = ["", '{"text": "a\u2028b"}', "  ", '{"text": "two"}', ""]
    documents = read_documents(make("a.jsonl", b"\xef\xbb\xbf" + newline.join(rows).encode()))
    assert texts(documents) == ["a\u2028b", "two"]
    assert lines(documents) == [2, 4]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{broken", "not valid JSON"),
        ('{"a":' * 100_000, "not valid JSON"),  # deeper than Python recurses
        ('{"text": "a"} extra', "not valid JSON"),
        ('{"text": "a", "id": 1, "text": "b"}', "not valid JSON .duplicate key 'text'"),
        (
            '{"messages": [{"role": "user", "role": "assistant", "content": "u"}]}',
            "duplicate key 'role'",
        ),
        ('["text"]', "not a JSON object"),
        ('"text"', "not a JSON object"),
        ('{"txt": "a", "id": 1}', r"no 'text', prompt \+ completion, .* \(fields: txt, id\)"),
        ("{}", r"\(fields: none\)"),
        ('{"prompt": "a"}', r"\(fields: prompt\)"),
        ('{"text": 3}', "'text' is int, not text"),
        ('{"text": null}', "'text' is NoneType, not text"),
        ('{"text": " \\n"}', "'text' is empty"),
        ('{"prompt": "", "completion": "c"}', "'prompt' is empty"),
        ('{"prompt": "p", "completion": ""}', "'completion' is empty"),
        ('{"question": ["q"], "answer": "a"}', "'question' is list, not text"),
        ('{"question": "q", "answer": " "}', "'answer' is empty"),
        ('{"messages": []}', "'messages' is not a list of {role, content}"),
        ('{"messages": "hi"}', "'messages' is not a list"),
        ('{"messages": [{"role": "assistant"}]}', "'messages' is not a list"),
        ('{"messages": [{"role": "user", "content": 3}]}', "'messages' is not a list"),
        (
            '{"messages": [{"role": "user", "content": "u"}]}',
            "the last message is not the assistant's",
        ),
        # JSON can say it, UTF-8 and tokenizers cannot
        ('{"text": "half a \\ud83d pair"}', "'text'"),
    ],
)
def test_mistakes_are_reported_with_file_and_line(make, line, message):
    path = make("a.jsonl", f'{{"text": "fine"}}\n\n{line}\n{{"text": "fine"}}\n')
    with pytest.raises(DataError, match=message) as caught:
        read_documents(path)
    assert caught.value.where == f"{path}:3"
    assert caught.value.fix
    assert "\n" not in str(caught.value)


# .csv and .parquet


def write_parquet(path, columns):
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    return path


@pytest.mark.parametrize("prefix", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_csv(make, prefix, newline):
    content = newline.join(["question,answer", 'what?,"a, b"', '"who ""x""?",olá', ""]).encode()
    path = make("a.csv", prefix + content)
    assert read_documents(path) == [
        Document(" a, b", f"{path}:2", prompt="Question: what?\nAnswer:"),
        Document(" olá", f"{path}:3", prompt='Question: who "x"?\nAnswer:'),
    ]


def test_csv_of_a_spreadsheet_where_the_comma_is_the_decimal_mark(make):
    path = make("a.csv", 'question;answer\ndose?;"1,5 mg; daily"\nwhat?;a, b\n')
    assert texts(read_documents(path)) == [" 1,5 mg; daily", " a, b"]
    assert texts(read_documents(make("b.csv", "text,note\na; b,x;y\n"))) == ["a; b"]
    assert texts(read_documents(make("c.csv", "text\na; b\n"))) == ["a; b"]
    with pytest.raises(DataError, match=r"d.csv:2: 3 cells where the header names 2"):
        read_documents(make("d.csv", "question;answer\na;b;c\n"))


def test_csv_holds_text_whatever_it_looks_like(make):
    """None, NA and numbers are answers like any other."""
    path = make("a.csv", "prompt,completion\nallergies?,None\nsodium?,NA\nage?,42\ndose?,007\n")
    assert texts(read_documents(path)) == ["None", "NA", "42", "007"]


def test_csv_mistakes_are_reported(make):
    with pytest.raises(DataError, match=r"a.csv:2: no 'text'.*\(fields: body, id\)"):
        read_documents(make("a.csv", "body,id\nx,1\n"))
    with pytest.raises(DataError, match=r"a.csv:3: 'text' is"):
        read_documents(make("a.csv", "text,id\nx,1\n,2\n"))
    with pytest.raises(DataError, match="not a readable csv file"):
        read_documents(make("a.csv", 'text\n"never closed\n'))
    with pytest.raises(DataError, match=r"a.csv"):
        read_documents(make("a.csv", "text\n"))  # a header and nothing else
    with pytest.raises(DataError, match=r"a.csv:2: byte 0xe1 is not UTF-8"):
        read_documents(make("a.csv", "text\nol\u00e1\n".encode("latin-1")))
    with pytest.raises(DataError, match=r"a.csv:3: binary content"):
        read_documents(make("a.csv", b"text\nx\ny\0z\n"))


def test_no_cell_of_a_table_is_lost_without_a_word(make, tmp_path):
    import pyarrow
    import pyarrow.parquet

    for content, line, words in (
        (
            "text\nfever, cough\n",
            2,
            "2 cells where the header names 1; put text that holds commas between quotes",
        ),
        ('text,id\n\nx,1\n\n"two\nlines",2,3\n', 6, "3 cells where the header names 2"),
        ("text,id\nx,1\ny\n", 3, "1 cells where the header names 2"),
        ("text,id,text\nx,1,y\n", 1, "duplicate column 'text'"),
        ("\n\ntext,,\nx,1,2\n", 3, "duplicate column ''"),
    ):
        with pytest.raises(DataError, match=rf"a.csv:{line}: {words}"):
            read_documents(make("a.csv", content))
    column = pyarrow.array(["a"])
    pyarrow.parquet.write_table(
        pyarrow.Table.from_arrays([column, column], names=["text", "text"]), tmp_path / "a.parquet"
    )
    with pytest.raises(
        DataError, match=r"not a readable parquet file .*Multiple matches for .*text"
    ):
        read_documents(tmp_path / "a.parquet")


def test_csv_cells_may_be_long(make):
    long = "fever " * 100_000  # more than the standard reader takes unless told
    assert texts(read_documents(make("a.csv", f"text\n{long}\n"))) == [long]


def test_parquet(tmp_path):
    chat = [{"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}]
    path = write_parquet(tmp_path / "a.parquet", {"text": ["one", "two"], "id": [1, 2]})
    assert read_documents(path) == [Document("one", f"{path}:1"), Document("two", f"{path}:2")]
    path = write_parquet(tmp_path / "b.parquet", {"messages": [chat]})
    assert read_documents(path) == [Document("", f"{path}:1", messages=tuple(chat))]
    path = write_parquet(tmp_path / "c.parquet", {"prompt": ["p"], "completion": ["c"]})
    assert read_documents(path) == [Document("c", f"{path}:1", prompt="p")]


def test_parquet_mistakes_are_reported(make, tmp_path, capfd):
    path = write_parquet(tmp_path / "a.parquet", {"text": ["one", None]})
    with pytest.raises(DataError, match=r"a.parquet:2: 'text' is NoneType"):
        read_documents(path)
    with pytest.raises(DataError, match=r"b.parquet: not a readable parquet file"):
        read_documents(make("b.parquet", "text,id\n1,2\n"))
    with pytest.raises(DataError, match="contains no documents"):
        read_documents(write_parquet(tmp_path / "c.parquet", {"text": []}))
    assert capfd.readouterr().err == ""  # the library's own words would come beside our line


def test_tables_leave_nothing_behind(make, tmp_path):
    path = make("a.csv", "text\none\n")
    read_documents(path)
    assert list(tmp_path.iterdir()) == [path]


def test_a_table_that_was_changed_is_read_again(make):
    assert texts(read_documents(make("a.csv", "text\none\n"))) == ["one"]
    assert texts(read_documents(make("a.csv", "text\ntwo\n"))) == ["two"]


# Files that are not what they should be


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.csv", "a.parquet"])
def test_empty_missing_and_folder(make, tmp_path, name):
    with pytest.raises(DataError, match=rf"{name}: no such file"):
        read_documents(tmp_path / name)
    with pytest.raises(DataError, match=rf"{name}: the file is empty"):
        read_documents(make(name, b""))
    (tmp_path / "folder").mkdir()
    with pytest.raises(DataError, match="folder: is a folder"):
        read_documents(tmp_path / "folder")


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_binary_latin1_and_blank(make, name):
    # lines are checked in order: the first ones are good
    fine = '{"text": "fine"}' if name.endswith(".jsonl") else "fine"
    with pytest.raises(DataError, match=rf"{name}:20001: binary content, not text"):
        read_documents(make(name, f"{fine}\n".encode() * 20_000 + b"x\0y\n"))
    with pytest.raises(DataError, match="binary content, not text"):
        read_documents(make(name, b"PK\x03\x04\0\0\0"))
    with pytest.raises(DataError, match="binary content, not text"):
        read_documents(make(name, "text\n".encode("utf-16")))
    with pytest.raises(DataError, match=rf"{name}:3: byte 0xe1 is not UTF-8; .*iconv"):
        read_documents(make(name, f"{fine}\n{fine}\nol\u00e1\n".encode("latin-1")))
    with pytest.raises(DataError, match=rf"{name}:2: byte 0xc3 is not UTF-8"):
        read_documents(make(name, fine.encode() + b"\ncut off \xc3"))
    with pytest.raises(DataError, match="contains no documents"):
        read_documents(make(name, " \n\n\t\n"))


@pytest.mark.parametrize("name", ["a.json", "a", "a.md"])
def test_unknown_kinds_name_the_known(make, name):
    with pytest.raises(
        DataError, match=r"unknown kind of file '.*'; give one of .txt, .jsonl, .csv, .parquet"
    ):
        read_documents(make(name, "text"))


# Packed, and row by row

PACKED = {
    "a.txt": "one\ntwo\n",
    "a.jsonl": '{"text": "one"}\n{"text": "twö"}\n',
    "a.csv": 'prompt,completion\na,"b\nc"\nd,é\n',
}


@pytest.mark.parametrize("name", PACKED)
def test_a_packed_file_is_the_file(make, name):
    plain = read_documents(make(name, PACKED[name]))
    packed = read_documents(make(f"{name}.gz", gzip.compress(PACKED[name].encode())))
    assert texts(packed) == texts(plain) and lines(packed) == lines(plain)
    assert packed[0].where.endswith(f"{name}.gz:{lines(plain)[0]}")


@pytest.mark.parametrize(
    "content",
    [b"plain text", gzip.compress(b"one\n" * 5000)[:-9], gzip.compress(b"x" * 99)[:20]],
    ids=["not packed", "cut at its end", "cut in its middle"],  # the packed bytes hold the time
)
def test_a_damaged_packed_file_is_named(make, content):
    path = make("a.txt.gz", content)
    for read in (read_documents, lambda path: list(numbered_lines(path))):
        with pytest.raises(DataError, match=r"a.txt.gz: not a readable gzip file"):
            read(path)


@pytest.mark.parametrize("name", ["a.gz", "a.parquet.gz", "a.docx"])
def test_other_kinds_are_refused(make, name):
    with pytest.raises(DataError, match="unknown kind of file"):
        read_documents(make(name, "x"))


def test_rows_of_a_table_are_read_as_they_are_needed(make):
    """A mistake far down is none before it is reached."""
    table = make("a.csv", "prompt\n" + "a\n" * 50_000 + "b,c\n")
    reading = rows(table)
    assert next(reading) == (f"{table}:2", {"prompt": "a"})
    with pytest.raises(DataError, match=r"a.csv:50002: 2 cells"):
        list(reading)
