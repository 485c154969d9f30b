"""What a text says: which option it names, whether it is yes or no, and when two texts are the same answer."""

import itertools
import re
import string

LETTERS = string.ascii_uppercase
COUNTED = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
NUMBERS = {"none": "0"} | {word: str(number) for number, word in enumerate(COUNTED)}
ARTICLES = {"a", "an", "the"}
# Those whose letters are no other word: "its" and "well" stay what they are.
CONTRACTED = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've
he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't not've
o'clock oughtn't shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd
someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've there're there's
they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's what've when's
where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've wouldn't wouldn't've
y'all y'all'll y'all'd've you'd you'd've you'll you're you've
"""
PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'

OPTION_LINE = re.compile(r"^[ \t]*\(?([A-Z])[.):][ \t]*(.+?)[ \t]*$", re.MULTILINE)
ONLY_A_LETTER = re.compile(r"\(?([A-Za-z])\)?[.:,)]*")
BEGINS_WITH_LETTER = re.compile(r"\(([A-Za-z])\)|([A-Za-z])[.:)](?=\s)")
SAYS_LETTER = re.compile(
    r"(?i:\b(?:answer|option|choice)(?:\s+is)?)\s*:?\s*(?:\(([A-Za-z])\)|([A-Z])\b(?!['’])|([a-z])(?=\.?\s*$))"
)
IN_BRACKETS = re.compile(r"\(([A-Z])\)")


def plain(text: str) -> str:
    """Returns the text in lower case, without extra blanks and all punctuation but the signs and points of numbers."""
    return " ".join(re.sub(r"[^\w\s.%-]|\.(?!\d)|(?<=[^\W\d])-|-(?!\.?\d)", "", text.lower()).split())


def normalised(text: str) -> str:
    """Returns the text as the VQA challenge compares it: number words as digits, no articles, apostrophes put back.

    The processing of M4C and TextVQA (arXiv 1911.06258): commas, question marks and letter case go first.
    """
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    text = text.replace("\n", " ").replace("\t", " ")
    told = text
    for mark in PUNCTUATION:
        beside_a_blank = mark + " " in told or " " + mark in told
        text = text.replace(mark, "" if beside_a_blank else " ")
    text = re.sub(r"\.(?!\d)", "", text)
    words = (NUMBERS.get(word, word) for word in text.split())
    return " ".join(APOSTROPHES.get(word, word) for word in words if word not in ARTICLES)


def parse_choice(text: str, choices: tuple[str, ...]) -> str | None:
    """Returns the letter of the option that a reply names, or None where it names none or several.

    Tried in this order: a letter alone ("B", "(b)", "B."), an option's full text, a letter at the beginning
    ("B. a cat", "(B) a cat"), "the answer is B", one letter in brackets, one option's text as part of the reply.
    """
    text = text.strip()
    offered = LETTERS[: len(choices)]
    letter = _one(ONLY_A_LETTER.fullmatch(text), offered)
    if letter:
        return letter
    same = [i for i, choice in enumerate(choices) if plain(choice) and plain(choice) == plain(text)]
    if len(same) == 1:
        return LETTERS[same[0]]
    said = [_one(match, offered) for match in SAYS_LETTER.finditer(text)]
    bracketed = {letter for letter in IN_BRACKETS.findall(text) if letter in offered}
    return (
        _one(BEGINS_WITH_LETTER.match(text), offered)
        or next((letter for letter in reversed(said) if letter), None)
        or (bracketed.pop() if len(bracketed) == 1 else None)
        or _mentioned(plain(text), [plain(choice) for choice in choices])
    )


def yes_or_no(text: str) -> str | None:
    """Returns "yes" or "no" if the first four characters of a reply say so, as the evaluation of MME reads it."""
    head = text.strip().lower()
    if head in ("y", "n"):
        return {"y": "yes", "n": "no"}[head]
    return next((word for word in ("yes", "no") if word in head[:4]), None)


def split_options(text: str) -> tuple[str, tuple[str, ...] | None]:
    """Takes the lines "A. ...", "B. ..." out of a question; returns what stands before them, and the options.

    None instead of options where there are not at least two in the order of the alphabet.
    """
    lines = list(OPTION_LINE.finditer(text))
    if len(lines) < 2 or "".join(line[1] for line in lines) != LETTERS[: len(lines)]:
        return text.strip(), None
    asked = re.sub(r"\s*(?i:choices|options):?\s*$", "", text[: lines[0].start()])
    return asked.strip(), tuple(line[2] for line in lines)


def _one(match: re.Match | None, offered: str) -> str | None:
    """The letter a pattern found, if such an option was offered."""
    letter = next((group.upper() for group in match.groups() if group), "") if match else ""
    return letter if letter and letter in offered else None


def _mentioned(text: str, choices: list[str]) -> str | None:
    """The only option whose words occur in the text; one inside another that occurs does not count."""
    there = [choice for choice in choices if choice and re.search(rf"(?<!\w){re.escape(choice)}(?!\w)", text)]
    longest = [choice for choice in there if not any(choice != other and choice in other for other in there)]
    return LETTERS[choices.index(longest[0])] if len(longest) == 1 else None


def _without_some(word: str) -> list[str]:
    """The word without one or more of its apostrophes, in every way."""
    first, *rest = word.split("'")
    ways = itertools.product(("", "'"), repeat=len(rest))
    return [first + "".join(map("".join, zip(marks, rest, strict=True))) for marks in ways if "" in marks]


APOSTROPHES = {bare: word for word in CONTRACTED.split() for bare in _without_some(word)}
