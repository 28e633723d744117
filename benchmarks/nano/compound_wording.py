"""How several questions are put as one: openings, connectives, lists, and sums on a fact.

`{a}` is a part as part of a sentence ("what is 2 + 2"), `{A}` the part as it stands. Every group
has members of its own for held-out wordings, which training never shows. Training also shows
improvised wordings, whose words mean nothing: a model shall find where a part begins, and not learn
by heart what stands before it.
"""

from __future__ import annotations

import random

from benchmarks.nano import invented
from benchmarks.nano.code_inputs import WORDS
from benchmarks.nano.task import Split

Wordings = dict[Split, tuple[str, ...]]

OPENINGS: Wordings = {
    "seen": (
        "Two questions: ",
        "Please answer both: ",
        "Please answer this: ",
        "I have two questions. ",
        "I have a few questions. ",
        "Answer these: ",
        "Answer the following: ",
        "Here are two tasks. ",
        "Here are my questions: ",
        "Tell me two things: ",
        "Help me with this: ",
        "Please help. ",
        "Please: ",
        "Hi! ",
        "Hello, ",
        "Hey, ",
        "Good evening. ",
        "Do both: ",
        "Do the following: ",
        "Two tasks: ",
        "Questions: ",
        "Q: ",
        "Can you help? ",
        "I need two answers. ",
        "Both of these, please: ",
        "First, ",
        "First ",
        "First: ",
        "First of all, ",
        "Firstly, ",
        "Initially, ",
        "To start, ",
        "Let us begin: ",
        "Quick questions: ",
        "Quick question: ",
        "My questions: ",
        "Answer in order: ",
        "Just curious: ",
        "This is for school. ",
        "I am curious: ",
        "Could you help me? ",
        "Two things I need. ",
        "Dear assistant, ",
        "OK, ",
        "So, ",
        "Well, ",
    ),
    "held_out": (
        "A couple of things: ",
        "To begin with, ",
        "I would like two answers. ",
        "Could you answer these two? ",
        "Good morning! ",
        "Listen, ",
    ),
}
"""What may stand before the first part."""

SENTENCE_JOINS: Wordings = {
    "seen": (
        " {B}",
        " {B}",
        " Also, {b}",
        " Also: {B}",
        " Also {b}",
        " And {b}",
        " And also: {b}",
        " And also {b}",
        " Then {b}",
        " Then, {b}",
        " And then {b}",
        " After that, {b}",
        " Afterwards, {b}",
        " In addition, {b}",
        " Besides, {b}",
        " Besides that, {b}",
        " Next, {b}",
        " Next: {B}",
        " Second, {b}",
        " Secondly, {b}",
        " Plus: {B}",
        " Finally, {b}",
        " And finally, {b}",
        " Lastly, {b}",
        " One more thing: {b}",
        " One more: {B}",
        " Then tell me: {b}",
        " Furthermore, {b}",
        " By the way, {b}",
        " Now {b}",
        " On top of that, {b}",
        " I also want to know: {b}",
        " I also need this: {b}",
        " Second question: {b}",
        " Second task: {B}",
        " Next question: {B}",
        " Also please answer this: {b}",
        " Apart from that, {b}",
        " And another one: {B}",
        " Once that is done, {b}",
        " When you have that, {b}",
        " Separately, {b}",
        " At the same time, {b}",
        " And, {b}",
        " And now {b}",
        " Please also: {b}",
        "\n{B}",
        "\n\nThen: {B}",
    ),
    "held_out": (
        " Moreover, {b}",
        " Another question: {b}",
        " Oh, and {b}",
        " While you are at it, {b}",
        " Something else: {B}",
        " Additionally, {b}",
        " And to finish, {b}",
    ),
}
"""What links a part to a whole sentence before it."""

CLAUSE_JOINS: Wordings = {
    "seen": (
        ", and {b}",
        ", and {b}",
        " and {b}",
        " and {b}",
        "; {b}",
        "; and {b}",
        "; also, {b}",
        "; then {b}",
        ", then {b}",
        ", and then {b}",
        " and then {b}",
        ", and also {b}",
        " and also {b}",
        ", also {b}",
        ", {b}",
        " - {b}",
        " & {b}",
        " / {B}",
        " | {B}",
        ", and after that {b}",
        ", after that {b}",
        ", next {b}",
        ", and next {b}",
        ", and finally {b}",
        ", and secondly {b}",
        ", and furthermore {b}",
        "... and {b}",
        " + {b}",
    ),
    "held_out": (
        ", plus {b}",
        ", and in addition {b}",
        "; moreover, {b}",
        ", and besides that {b}",
        ", and as a second question {b}",
        " -- and {b}",
    ),
}
"""What links a part to one before it that has lost its final mark."""

ENDINGS: Wordings = {
    "seen": (
        " Thanks.",
        " Thank you!",
        " Please.",
        " Please answer both.",
        " Answer both questions.",
        " I need both answers.",
        " Answer in order.",
        " Be brief.",
    ),
    "held_out": (" Give me both answers, please.", " Many thanks."),
}

LIST_MARKS: dict[Split, tuple[tuple[str, str, str], ...]] = {
    "seen": (
        ("1. ", "2. ", "3. "),
        ("1) ", "2) ", "3) "),
        ("(1) ", "(2) ", "(3) "),
        ("a) ", "b) ", "c) "),
        ("(a) ", "(b) ", "(c) "),
        ("a. ", "b. ", "c. "),
        ("i. ", "ii. ", "iii. "),
        ("- ", "- ", "- "),
        ("* ", "* ", "* "),
        ("Question 1: ", "Question 2: ", "Question 3: "),
        ("Question one: ", "Question two: ", "Question three: "),
        ("Q1: ", "Q2: ", "Q3: "),
        ("Task 1: ", "Task 2: ", "Task 3: "),
        ("First: ", "Second: ", "Third: "),
        ("First question: ", "Second question: ", "Third question: "),
        ("One: ", "Two: ", "Three: "),
        ("#1 ", "#2 ", "#3 "),
    ),
    "held_out": (
        ("Part one: ", "Part two: ", "Part three: "),
        ("Item 1: ", "Item 2: ", "Item 3: "),
        ("Alpha: ", "Beta: ", "Gamma: "),
        ("No. 1: ", "No. 2: ", "No. 3: "),
        ("> ", "> ", "> "),
    ),
}

HEADS: Wordings = {
    "seen": (
        "Tell me",
        "Give me",
        "What are",
        "I need",
        "Find",
        "State",
        "Name",
        "Let me know",
        "I would like to know",
        "Please give me",
        "Please tell me",
        "Do you know",
        "Look up",
        "Write down",
    ),
    "held_out": ("Can you tell me", "Show me", "I want to know", "Kindly list"),
}
"""What may stand before several noun phrases."""

PRONOUNS: Wordings = {
    "seen": ("it", "that", "the result", "this number", "the number", "this", "that result"),
    "held_out": ("the answer", "that number", "this value"),
}
"""What stands for the answer of the part before."""

TAKES: Wordings = {
    "seen": ("Take", "Find", "Start with", "Look up", "Get", "Work out", "Determine"),
    "held_out": ("Begin with", "Figure out", "Search for"),
}
"""Imperatives before the noun phrase of a first hop."""

HOP_JOINS: Wordings = {
    "seen": (
        ", then {b}",
        ", and then {b}",
        " and {b}",
        " and then {b}",
        ", and {b}",
        "; {b}",
        "; then {b}",
        ". {B}",
        ". Then {b}",
        ". Now {b}",
        ". After that, {b}",
        ". Next, {b}",
        ", after that {b}",
        ". And {b}",
        ". Finally, {b}",
        ". With it known, {b}",
    ),
    "held_out": (
        ". Afterwards {b}",
        " and in the next step {b}",
        ". Once you know, {b}",
        " - then {b}",
    ),
}
"""What links a sum on an answer to the part that asks for it."""

NUMBER_HOPS: dict[Split, tuple[tuple[str, str], ...]] = {
    "seen": (
        ("Multiply {x} by {n}.", "*"),
        ("What is {x} times {n}?", "*"),
        ("What do you get for {x} times {n}?", "*"),
        ("How much is {x} times {n}?", "*"),
        ("What is {x} multiplied by {n}?", "*"),
        ("Work out {x} times {n} for me.", "*"),
        ("Add {n} to {x}.", "+"),
        ("Add {x} and {n}.", "+"),
        ("What is {x} plus {n}?", "+"),
        ("What do you get for {x} plus {n}?", "+"),
        ("What number is {n} more than {x}?", "+"),
        ("Work out {x} plus {n} for me.", "+"),
        ("What do you get when {x} and {n} are added?", "+"),
        ("Subtract {n} from {x}.", "-"),
        ("Take {n} away from {x}.", "-"),
        ("What is {x} minus {n}?", "-"),
        ("What do you get for {x} minus {n}?", "-"),
        ("What number is {n} less than {x}?", "-"),
        ("What is left from {x} when you remove {n}?", "-"),
        ("Divide {x} by {n}.", "/"),
        ("What is {x} divided by {n}?", "/"),
        ("How much is {x} divided by {n}?", "/"),
        ("What is {n}% of {x}?", "%"),
        ("Calculate {n}% of {x}.", "%"),
        ("Find {n} percent of {x}.", "%"),
        ("How much is {n}% of {x}?", "%"),
        ("Take {n}% of {x}.", "%"),
        ("What is {n} percent of {x}?", "%"),
    ),
    "held_out": (
        ("Calculate the product of {x} and {n}.", "*"),
        ("Find the result of multiplying {x} with {n}.", "*"),
        ("Find {x} increased by {n}.", "+"),
        ("What is the total of {x} and {n}?", "+"),
        ("Find {x} decreased by {n}.", "-"),
        ("What remains when {n} is subtracted from {x}?", "-"),
        ("What do you get when {x} is divided by {n}?", "/"),
        ("Tell me {n} percent of {x}.", "%"),
    ),
}
"""Sums on an answer `{x}`, all in trained wordings of nano-math, with their operation.

A held-out one is a wording that nano-math knows, but that no trained compound question has.
"""

VALUE_HOPS: dict[Split, tuple[tuple[str, str], ...]] = {
    "seen": (
        ("What is {x} in binary?", "to_binary"),
        ("Convert {x} to binary.", "to_binary"),
        ("What is the digit sum of {x}?", "digit_sum"),
        ("Sum the digits of {x}.", "digit_sum"),
        ("How many divisors does {x} have?", "count_divisors"),
        ("What is {x} in hexadecimal?", "to_hex"),
    ),
    "held_out": (
        ("Express {x} in binary.", "to_binary"),
        ("What do the digits of {x} add up to?", "digit_sum"),
        ("Count the divisors of {x}.", "count_divisors"),
    ),
}
"""Questions about a number `{x}` in trained wordings of nano-code, with the kind of value."""

TEXT_HOPS: dict[Split, tuple[tuple[str, str], ...]] = {
    "seen": (
        ("How many characters does {x} have?", "string_length"),
        ("What is {x} spelled backwards?", "reverse_string"),
        ("Write {x} backwards.", "reverse_string"),
        ("Spell {x} in reverse.", "reverse_string"),
    ),
    "held_out": (("Given {x}, how many characters long is it?", "string_length"),),
}
"""Questions about a text `{x}` in trained wordings of nano-code; the part quotes the text."""

PAIR_HOPS: dict[Split, tuple[tuple[str, str], ...]] = {
    "seen": (
        ("Add {x} and {y}.", "+"),
        ("Add {x} to {y}.", "+"),
        ("Multiply {x} by {y}.", "*"),
        ("What is {x} plus {y}?", "+"),
        ("What is {x} times {y}?", "*"),
        ("What do you get for {x} plus {y}?", "+"),
        ("Calculate the sum of {x} and {y}.", "+"),
    ),
    "held_out": (
        ("What is the total of {x} and {y}?", "+"),
        ("Find the result of multiplying {x} with {y}.", "*"),
    ),
}
"""Sums on two answers, in trained wordings of nano-math, with their operation."""

SUM_PHRASES: tuple[tuple[str, str], ...] = (
    ("{a} times {b}", "*"),
    ("{a} plus {b}", "+"),
    ("{a} minus {b}", "-"),
    ("{a} divided by {b}", "/"),
    ("{a} multiplied by {b}", "*"),
    ("{b}% of {a}", "%"),
    ("{b} percent of {a}", "%"),
)
"""Noun phrases for a sum; "What is …?" around one is a trained wording of nano-math."""

OTHER_SUBJECTS: tuple[str, ...] = (
    "atomic number of {element}",
    "atomic mass of {element}",
    "melting point of {element}",
    "population of {country}",
    "area of {country}",
    "national flower of {country}",
    "highest mountain of {country}",
    "president of {country}",
    "calling code of {country}",
    "number of letters in {country}",
    "population of {word}",
    "age of {word}",
    "price of a {thing}",
    "weight of a {thing}",
    "number of {thing}s in a {word}",
    "postal code of {word}",
    "speed of the {word}",
    "mayor of {word}",
    "distance from {word} to {country}",
    "number of players in a {word} team",
    "third letter of {word}",
    "plural of {thing}",
)
"""Noun phrases that no nano model answers, so that splitting does not depend on the relation."""

_GLUE = ("the", "of", "by", "with", "for", "to", "from", "all", "one", "so", "at", "me", "is", "it")


def _words(rng: random.Random, fewest: int, most: int) -> str:
    """Words without a meaning together, none of them a reserved name."""
    drawn = []
    for _ in range(rng.randint(fewest, most)):
        draw = rng.random()
        if draw < 0.4:
            drawn.append(rng.choice(_GLUE))
        elif draw < 0.8:
            drawn.append(rng.choice(WORDS))
        else:
            drawn.append(invented.word(rng, reserved=False).lower())
    return " ".join(drawn)


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def improvised_opening(rng: random.Random) -> str:
    """What may stand before the first part."""
    return _capital(_words(rng, 1, 5)) + rng.choice((", ", ": ", ". ", "! ", "? "))


def improvised_sentence_join(rng: random.Random) -> str:
    """What may link a part to a whole sentence before it."""
    words = _capital(_words(rng, 1, 4))
    return " " + words + rng.choice((", {b}", ", {b}", ": {B}", ": {b}", " {b}", ". {B}"))


def improvised_clause_join(rng: random.Random) -> str:
    """What may link a part to one before it that has lost its final mark."""
    if rng.random() < 0.3:
        return rng.choice((" ~ {b}", " => {b}", " -> {B}", " // {b}", " > {B}", " * {b}", ": {b}"))
    mark = rng.choice((",", ",", ";", ", and", ", and", " and", "..."))
    return f"{mark} {_words(rng, 1, 3)}" + rng.choice((" {b}", " {b}", ", {b}", ": {b}"))


def improvised_ending(rng: random.Random) -> str:
    """What may stand behind the last part."""
    return " " + _capital(_words(rng, 1, 5)) + rng.choice((".", "!"))


def improvised_marks(rng: random.Random) -> tuple[str, str, str]:
    """What may stand before the entries of a list."""
    draw = rng.random()
    if draw < 0.3:
        mark = rng.choice(("~ ", "=> ", "-> ", "+ ", "# ", "-- ", ": "))
        return (mark, mark, mark)
    if draw < 0.6:
        word, mark = _capital(_words(rng, 1, 2)), rng.choice((": ", ") ", ". ", " - "))
        return (f"{word} 1{mark}", f"{word} 2{mark}", f"{word} 3{mark}")
    if draw < 0.75:
        opened, closed = rng.choice((("[", "] "), ("<", "> "), ("", ": "), ("", " - ")))
        numbers = rng.choice(("123", "ABC", "xyz"))
        return (
            f"{opened}{numbers[0]}{closed}",
            f"{opened}{numbers[1]}{closed}",
            f"{opened}{numbers[2]}{closed}",
        )
    one, two, three = (_capital(_words(rng, 1, 2)) for _ in range(3))
    return (f"{one}: ", f"{two}: ", f"{three}: ")


def improvised_head(rng: random.Random) -> str:
    """What may stand before several noun phrases."""
    return _capital(_words(rng, 1, 4))


def improvised_pronoun(rng: random.Random) -> str:
    """What may stand for the answer of the part before."""
    return f"{rng.choice(('the', 'this', 'that'))} {_words(rng, 1, 2)}"


def improvised_take(rng: random.Random) -> str:
    """What may stand before the noun phrase of a first hop."""
    return _capital(_words(rng, 1, 3))


def improvised_hop_join(rng: random.Random) -> str:
    """What may link a sum on an answer to the part that asks for it."""
    words = _words(rng, 1, 4)
    if rng.random() < 0.5:
        return f". {_capital(words)}" + rng.choice((" {b}", ", {b}"))
    return rng.choice((", ", " and ", " - ", "; ")) + words + rng.choice((" {b}", " {b}", ", {b}"))


def improvised_number_hop(rng: random.Random) -> tuple[str, str]:
    """A sum on an answer `{x}` and a number, and an operation."""
    pieces = [_words(rng, 1, 4), "{x}", _words(rng, 0, 3), "{n}", _words(rng, 0, 2)]
    if rng.random() < 0.4:
        pieces[1], pieces[3] = pieces[3], pieces[1]
    if rng.random() < 0.4:
        return "What is " + _spaced(pieces) + "?", "+"
    return _capital(_spaced(pieces)) + rng.choice("..?"), "+"


def improvised_pair_hop(rng: random.Random) -> tuple[str, str]:
    """A sum on two answers, and an operation."""
    pieces = [_words(rng, 1, 4), "{x}", rng.choice(("and", _words(rng, 1, 2))), "{y}"]
    return _capital(_spaced(pieces)) + rng.choice("..?"), "+"


def _spaced(pieces: list[str]) -> str:
    return " ".join(piece for piece in pieces if piece)
