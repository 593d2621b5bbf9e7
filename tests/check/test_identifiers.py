"""Personal data that rules can find, and what only looks like it."""

import random
import re

import pytest

from lorabatch.check import numbers
from lorabatch.check.identifiers import identifiers


def kinds(text):
    return sorted({found.kind for found in identifiers(text)})


# --- numbers, made by arithmetic of the test's own ---


def digits_of(generator, count):
    return [generator.randrange(10) for _ in range(count)]


def cpf(generator):
    """The rule as the revenue service words it: a remainder of ten times the weighted sum."""
    digits = digits_of(generator, 9)
    for _ in range(2):
        weighted = sum((len(digits) + 1 - i) * d for i, d in enumerate(digits))
        digits.append(weighted * 10 % 11 % 10)
    d = "".join(map(str, digits))
    return f"{d[:3]}.{d[3:6]}.{d[6:9]}-{d[9:]}"


def cns(generator):
    while True:
        number = f"{generator.choice('789')}{generator.randrange(10**14):014d}"
        if sum((15 - i) * int(d) for i, d in enumerate(number)) % 11 == 0:
            return f"{number[:3]} {number[3:7]} {number[7:11]} {number[11:]}"


def cnpj(generator):
    characters = "".join(generator.choice("0123456789ABCDEFGHJKLMNPRSTVWXYZ") for _ in range(12))
    for _ in range(2):
        weights = [2 + i % 8 for i in range(len(characters))][::-1]
        weighted = sum(w * (ord(c) - 48) for w, c in zip(weights, characters, strict=True))
        characters += str(0 if weighted % 11 < 2 else 11 - weighted % 11)
    c = characters
    return f"{c[:2]}.{c[2:5]}.{c[5:8]}/{c[8:12]}-{c[12:]}"


def card(generator):
    digits = [4, *digits_of(generator, 14)]
    for last in range(10):
        doubled = [d * 2 if i % 2 == 0 else d for i, d in enumerate([*digits, last])]
        if sum(sum(map(int, str(d))) for d in doubled) % 10 == 0:
            d = "".join(map(str, [*digits, last]))
            return " ".join(d[i : i + 4] for i in range(0, 16, 4))
    raise AssertionError


def iban(generator):
    account = "".join(map(str, digits_of(generator, 18)))
    check = 98 - int(account + "131400") % 97  # D is 13, E is 14
    return f"DE{check:02d}{account}"


MADE = {
    "CPF": (cpf, "O paciente de CPF {} voltou."),
    "CNS": (cns, "Cartão nacional de saúde {}, retorno em maio."),
    "CNPJ": (cnpj, "Nota da clínica, {}."),
    "card": (card, "Paid by credit card {} at the desk."),
    "IBAN": (iban, "Please transfer to {} today."),
}


@pytest.mark.parametrize("kind", MADE)
def test_numbers_with_right_check_digits_are_found_and_others_are_not(kind):
    make, sentence = MADE[kind]
    generator = random.Random(kind)
    for _ in range(300):
        number = make(generator)
        assert kinds(sentence.format(number)) == [kind], number
        wrong = number[:-1] + str((int(number[-1]) + generator.randint(1, 9)) % 10)
        assert kind not in kinds(sentence.format(wrong)), wrong


@pytest.mark.parametrize(
    ("test", "number", "valid"),
    [
        (numbers.is_cpf, "39053344705", True),
        (numbers.is_cpf, "11111111111", False),  # passes the arithmetic
        (numbers.is_cnpj, "12ABC34501DE35", True),  # the authority's example of 2026
        (numbers.is_cnpj, "12ABC34501DE36", False),
        (numbers.is_cns, "898000000043208", True),  # the ministry's page
        (numbers.is_cns, "898000000043209", False),
        (numbers.is_ssn, "536904399", True),
        (numbers.is_ssn, "078051120", False),  # printed on wallets
        (numbers.is_ssn, "666123456", False),
        (numbers.is_card, "4111111111111111", True),
        (numbers.is_iban, "GB82WEST12345698765432", True),
        (numbers.is_iban, "GB82WEST12345698765431", False),
    ],
)
def test_published_numbers(test, number, valid):
    assert test(number) == valid


def test_one_random_number_in_a_hundred_is_a_cpf_so_bare_digits_need_the_word():
    generator = random.Random(0)
    drawn = [f"{generator.randrange(10**11):011d}" for _ in range(20_000)]
    share = sum(map(numbers.is_cpf, drawn)) / len(drawn)
    assert 0.008 < share < 0.012
    assert kinds("Sample 39053344705 was stored.") == []
    assert kinds("CPF: 39053344705") == ["CPF"]


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("SSN 536-90-4399.", "SSN"),
        ("Ligue para (21) 99876-5432.", "telephone"),
        ("Fone +55 11 3456-7890", "telephone"),
        ("Call 212-555-0187 now", "telephone"),
        ("Rua Um, 22041-080, Rio", "CEP"),
        ("Assinado por CRM-SP 123456", "CRM"),
        ("Write to ana.b@hospital.org.br.", "e-mail"),
        ("See https://clinic.org/patients/77?x=1", "URL"),
        ("The server 8.8.4.4 answered", "IP address"),
        ("MRN: 0045981", "record number"),
        ("Prontuário nº 123.456", "record number"),
        ("prontuário: 998877", "record number"),
        ("medical record number 771234", "record number"),
        ("DOB 03/04/1950", "date of birth"),
        ("nascida em 12/05/1948", "date of birth"),
        ("nascido em 3 de março de 1950", "date of birth"),
        ("born on March 3, 1950", "date of birth"),
        ("whatsapp 21998765432", "telephone"),
        ("A 93-year-old woman", "age over 89"),
        ("Homem de 101 anos de idade", "age over 89"),
    ],
)
def test_other_kinds(text, kind):
    found = list(identifiers(text))
    assert [f.kind for f in found] == [kind]
    assert not re.search(r"\d{3}", found[0].masked)


@pytest.mark.parametrize(
    "text",
    [
        "Doses of 10-20-3000 units; sodium 138.5, potassium 4.25, 120/80 mmHg, pO2 88-92.",
        "doi:10.1186/s12859-019-3119-4, PMID 31647059, ICD C50.911, HP:0001250, OMIM 154700",
        "CAS 50-78-2, lot 20260412-3, ratio 1:10000, 1,234,567 copies, 12345678901234567890",
        "Section 1.2.3.4, versão 8.8.4.4, version 1.2.3.4567, chapter 10.11.12, the net 192.168.0.1 and 10.0.0.1",
        "Seen in 2019-2020 and 11 2020-2021; an 89-year-old; 95 years of research; 120 years ago",
        "Mail a@example.com, see https://www.example.org/path and http://host.invalid/x/y",
        "Registro 2019, atendimento 2024, the record of 12 cases",
        "Tel. 00 1234-5678 has no area code",
    ],
)
def test_what_only_looks_like_it_is_left_alone(text):
    assert kinds(text) == []


def test_a_masked_form_keeps_the_check_digits_at_most():
    found = [f for f in identifiers("CPF 390.533.447-05") if f.kind == "CPF"]
    assert [f.masked for f in found] == ["***.***.***-05"]


def test_long_texts_are_searched_to_their_end():
    text = "word " * 5000 + "CPF 390.533.447-05" + " 1234567" * 50 + " a@b.org"
    assert kinds(text) == ["CPF", "e-mail"]
