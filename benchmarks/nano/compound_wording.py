"""How several questions are put as one: openings, connectives, lists, and sums on a fact.

`{a}` is a part as part of a sentence ("what is 2 + 2"), `{A}` the part as it stands. Every group
has members of its own for held-out wordings, which training never shows.
"""

from __future__ import annotations

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
