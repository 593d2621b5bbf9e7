"""Hashes of words, overlaps and near-equal texts against slow and plain computations."""

import random
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorabatch.check import duplicates
from lorabatch.check import words as module
from lorabatch.check.duplicates import Sketches, earlier_equal
from lorabatch.check.overlap import BOILERPLATE, Overlap
from lorabatch.check.text import is_mojibake, languages, repeated_shares
from lorabatch.check.words import all_words, grams, normalised, text_hashes, words_of

TEXTS = st.lists(st.text(alphabet="ab cé1.-\nÀß", max_size=30), min_size=1, max_size=8)


def plain(text):
    return re.findall(r"\w+", normalised(text))


def sentence(generator, count, vocabulary=10**6):
    return " ".join(f"w{generator.randrange(vocabulary)}" for _ in range(count))


# --- words ---


@given(TEXTS)
def test_texts_have_equal_hashes_if_their_words_are_equal(texts):
    words = words_of(texts)
    found = {}
    for text, hash_ in zip(texts, text_hashes(words).tolist(), strict=True):
        found.setdefault(tuple(plain(text)), set()).add(hash_)
    assert words.counts.tolist() == [len(plain(text)) for text in texts]
    assert all(len(hashes) == 1 for hashes in found.values())
    assert len(set.union(*found.values())) == len(found)
    assert found.get((), {0}) == {0}


@given(TEXTS, st.integers(1, 4))
def test_runs_of_words_are_those_of_each_text_alone(texts, n):
    words = words_of(texts)
    hashes, places = grams(words, n)
    alone = [grams(words_of([text]), n)[0].tolist() for text in texts]
    assert hashes.tolist() == [hash_ for part in alone for hash_ in part]
    assert len(places) == sum(max(0, len(plain(text)) - n + 1) for text in texts)


@given(TEXTS)
def test_chunks_do_not_matter(texts):
    before, module.CHUNK_CHARACTERS = module.CHUNK_CHARACTERS, 5
    try:
        pieces = list(all_words(texts))
    finally:
        module.CHUNK_CHARACTERS = before
    assert [p.first for p in pieces] == np.cumsum([0, *(len(p.counts) for p in pieces)])[
        :-1
    ].tolist()
    assert np.concatenate([text_hashes(p) for p in pieces]).tolist() == (
        text_hashes(words_of(texts)).tolist()
    )


def test_case_accents_and_punctuation():
    same = ["Dose: 5 mg, daily!", "dose 5 MG daily", "DOSE (5\u00a0mg) daily"]
    assert len(set(text_hashes(words_of(same)).tolist())) == 1
    others = ["dose 50 mg daily", "dose 5 0 mg daily", "daily dose 5 mg", "dosé 5 mg daily"]
    assert len(set(text_hashes(words_of([same[0], *others])).tolist())) == 5
    composed, decomposed = "coração", "corac\u0327a\u0303o"
    assert len(set(text_hashes(words_of([composed, decomposed])).tolist())) == 1


def test_a_million_words_have_a_million_hashes():
    texts = [
        " ".join(f"{i:05d}" for i in range(start, start + 1000))
        for start in range(0, 100_000, 1000)
    ]
    hashes = np.concatenate([words.hashes for words in all_words(texts)])
    assert len(np.unique(hashes)) == 100_000


# --- leaks ---


def slow_share(held_out, training):
    """Share of words that stand in a run of eight which both have; longest run."""
    a, b = plain(held_out), plain(training)
    known = {tuple(b[i : i + 8]) for i in range(len(b) - 7)}
    covered, run, longest = [False] * len(a), 0, 0
    for i in range(len(a) - 7):
        if tuple(a[i : i + 8]) in known:
            covered[i : i + 8] = [True] * 8
            run += 1
            longest = max(longest, run + 7)
        else:
            run = 0
    return sum(covered) / max(len(a), 1), longest


def mixture(generator):
    """Texts that share passages by chance."""
    passages = [sentence(generator, generator.randint(4, 20)) for _ in range(6)]
    return [
        " ".join(
            generator.choice([*passages, sentence(generator, 5)])
            for _ in range(generator.randint(1, 6))
        )
        for _ in range(12)
    ]


def matches(held_out, training):
    overlap = Overlap(all_words(held_out))
    for words in all_words(training):
        overlap.add(words)
    return {m.held_out: m for m in overlap.matches()}


@pytest.mark.parametrize("seed", range(20))
def test_the_largest_share_is_that_of_a_direct_count(seed):
    texts = mixture(random.Random(seed))
    held_out, training = texts[:5], texts[5:]
    found = matches(held_out, training)
    for number, text in enumerate(held_out):
        shares = [slow_share(text, other) for other in training]
        if number in found:
            match = found[number]
            assert match.share == pytest.approx(max(share for share, _ in shares))
            assert shares[match.training] == (pytest.approx(match.share), match.run)
        else:
            assert max(shares) == (0, 0)


@settings(max_examples=20)
@given(st.integers(0, 1000), st.randoms())
def test_shares_do_not_depend_on_order_nor_on_unrelated_texts(seed, order):
    texts = mixture(random.Random(seed))
    held_out, training = texts[:5], texts[5:]
    shuffled = [*training, "a text that has nothing in common with any of the others at all"]
    order.shuffle(shuffled)
    before = {n: (m.share, m.run) for n, m in matches(held_out, training).items()}
    after = {n: m.share for n, m in matches(held_out, shuffled).items()}
    assert after == {n: share for n, (share, _) in before.items()}


def test_runs_that_many_training_texts_have_do_not_count():
    generator = random.Random(1)
    phrase = sentence(generator, 12)
    held_out = [phrase + " " + sentence(generator, 3)]
    training = [f"{phrase} {sentence(generator, 10)}" for _ in range(BOILERPLATE + 1)]
    assert matches(held_out, training) == {}
    assert matches(held_out, training[1:])[0].share == pytest.approx(12 / 15)


def test_nothing_to_compare_gives_nothing():
    assert matches([], ["some text"]) == {} == matches(["some text"], []) == matches(["!"], ["!"])


# --- repeats ---


def test_earlier_equal_texts():
    hashes = text_hashes(words_of(["a b", "c", "A, b", "...", "!", "c", "a b"]))
    assert list(earlier_equal(hashes)) == [(2, 0), (5, 1), (6, 0)]


def changed(generator, text, share):
    words = text.split()
    for i in generator.sample(range(len(words)), round(share * len(words))):
        words[i] = f"x{generator.randrange(10**6)}"
    return " ".join(words)


def jaccard(one, other):
    a, b = ({tuple(w[i : i + 5]) for i in range(len(w) - 4)} for w in (plain(one), plain(other)))
    return len(a & b) / len(a | b)


def groups(texts, least):
    sketches = Sketches()
    for words in all_words(texts):
        sketches.add(words)
    return [group for group in sketches.groups(least).members() if len(group) > 1]


def slow_groups(texts, least):
    found = [{n} for n in range(len(texts))]
    for n, text in enumerate(texts):
        for m in range(n):
            if jaccard(text, texts[m]) >= least:
                one, other = (next(g for g in found if i in g) for i in (n, m))
                if one is not other:
                    found.remove(other)
                    one |= other
    return sorted(sorted(group) for group in found if len(group) > 1)


@pytest.mark.parametrize("seed", range(5))
def test_near_equal_texts_are_all_found_and_no_others(seed):
    generator = random.Random(seed)
    texts = [sentence(generator, 120) for _ in range(30)]
    texts += [changed(generator, text, share) for text in texts[:20] for share in (0.01, 0.05)]
    generator.shuffle(texts)
    assert groups(texts, 0.9) == slow_groups(texts, 0.9) != []


@settings(max_examples=10)
@given(st.integers(0, 1000), st.randoms())
def test_groups_do_not_depend_on_order(seed, order):
    generator = random.Random(seed)
    texts = [sentence(generator, 60) for _ in range(8)]
    texts += [changed(generator, text, 0.02) for text in texts]
    shuffled = [*texts]
    order.shuffle(shuffled)

    def named(some):
        return {frozenset(some[n] for n in group) for group in groups(some, 0.8)}

    assert named(texts) == named(shuffled)


def test_templates_with_many_fillings_end_in_time(monkeypatch):
    """Pairs below the bound are not joined, and near-equal ones still are, whichever way they are
    compared."""
    base = sentence(random.Random(0), 100).split()

    def filled(number, extra=""):
        words = [*base]
        for place in (20, 50, 80):
            words[place] = f"name{number}"
        return " ".join(words) + extra

    texts = [filled(n) for n in range(60)] + [filled(7, " more")]
    assert 0.7 < jaccard(texts[0], texts[1]) < 0.8 and jaccard(texts[7], texts[-1]) > 0.95
    for most in (duplicates.MOST_COMPARISONS, 0):
        monkeypatch.setattr(duplicates, "MOST_COMPARISONS", most)
        assert groups(texts, 0.8) == [[7, 60]]


def test_short_and_empty_texts_are_near_equal_only_if_equal():
    assert groups(["yes it is", "", "Yes, it is!", "", "no"], 0.8) == [[0, 2]]


# --- what is wrong with one text ---


@pytest.mark.parametrize(
    ("text", "broken"),
    [
        ("informaÃ§Ã£o do paciente", True),
        ("nÃ£o hÃ¡ febre", True),
        ("the patientâ€™s chart", True),
        ("temperature 38 Â°C, 5 Âµg of x", True),
        ("A IRMÃ” disse; AMANHÃ… “MAÇÔ, NÃO, GRÃ-BRETANHA", False),
        ("coração, naïve, façade, Ångström, Ð", False),
        ("plain text", False),
    ],
)
def test_mojibake(text, broken):
    assert is_mojibake(text) == broken


def test_a_passage_that_makes_up_a_third_of_a_text_is_seen():
    generator = random.Random(0)
    passage, rest = sentence(generator, 15), [sentence(generator, 15) for _ in range(9)]
    texts = [
        f"{passage} {rest[0]} {passage} {rest[1]} {passage}",
        " ".join([passage, *rest]),
        "beep " * 100,
        f"{passage} {' '.join(rest)} {passage}",
        "short",
    ]
    shares = repeated_shares(words_of(texts))
    assert shares[0] == pytest.approx(0.4) and shares[2] == 1
    assert shares[[1, 3, 4]].tolist() == [0, 0, 0]


SPEECH = {
    "English": "The patient was seen in the clinic with a fever that had been there for two days and is now at home.",
    "Portuguese": "O paciente não tem febre há dois dias e foi para casa com uma receita do médico, mas também dos exames.",
    "Spanish": "El paciente no tiene fiebre desde hace dos días y fue a su casa con los medicamentos del médico, pero sin dolor.",
    "French": "Le patient est à la maison avec les médicaments qui ont été donnés dans cette clinique et il ne va pas mal.",
    "German": "Der Patient ist mit den Medikamenten nach Hause gegangen und wird von dem Arzt nicht mehr auf Fieber untersucht sein.",
    "Italian": "Il paziente è tornato a casa con le medicine della clinica e non ha più la febbre che aveva nel mese di maggio dei due anni.",
}


def test_languages():
    assert languages(words_of(list(SPEECH.values()))) == list(SPEECH)
    assert languages(words_of(["Hb 12.1 Na 138 K 4.1 " * 6, "The short one is."])) == [None, None]
