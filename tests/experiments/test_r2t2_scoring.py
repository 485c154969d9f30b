"""Scoring: every metric is the one of its paper, worked out by hand, and no prediction is lost or invented."""

import numpy as np
import pytest

from experiments.cli import UserError
from experiments.r2t2.benchmarks import PERCEPTION
from experiments.r2t2.images import EncodedImage
from experiments.r2t2.questions import Question
from experiments.r2t2.replies import normalised, parse_choice, plain, split_options, yes_or_no
from experiments.r2t2.scoring import (
    METRICS,
    Score,
    accuracy,
    anls,
    paper_averages,
    score,
    soft_accuracy,
    starts_with,
    to_examples,
)

OPTIONS = ("cat", "black cat", "a dog", "12", "A. Lincoln")


def question(name="0", answers=("yes",), choices=None, subtask="", source="") -> Question:
    image = EncodedImage(b"", f"row {name}")
    return Question(
        id=name,
        image=image,
        text="?",
        choices=choices,
        answers=answers,
        source=source,
        task="OCR",
        subtask=subtask,
        hint="",
    )


def refusal(*args, **kwargs) -> str:
    with pytest.raises(UserError) as error:
        score(*args, **kwargs)
    message = str(error.value)
    assert message.endswith(".") and "\n" not in message
    return message


@pytest.mark.parametrize(
    ("reply", "letter"),
    [
        *(("B", "B"), ("b", "B"), ("(B)", "B"), ("(b)", "B"), ("B.", "B"), ("B)", "B"), (" B:\n", "B")),
        *(("B. black cat", "B"), ("(B) black cat", "B"), ("B) it is black", "B"), ("A. a dog", "A")),
        *(("The answer is B", "B"), ("the answer is (b).", "B"), ("Answer: D", "D"), ("Option B.", "B")),
        *(("The answer is b.", "B"), ("Not option A, so the answer is B", "B")),
        *(("black cat", "B"), ("Black cat.", "B"), ("It is a black cat", "B"), ("A cat", "A"), ("a dog", "C")),
        *(("I think it must be (D), as there are 12", "D"), ("There are 12 of them", "D"), ("12", "D")),
        *(("I think it must be (C)", "C"), ("A. Lincoln", "E"), ("Lincoln", None)),
        *(("", None), ("F", None), ("cat or a dog", None), ("(A) or (B)", "A"), ("concatenate", None), ("112", None)),
    ],
)
def test_the_option_a_reply_names_is_found(reply, letter):
    assert parse_choice(reply, OPTIONS) == letter


def test_yes_and_no_are_read_from_the_first_four_characters():
    said = {
        "Yes": "yes",
        "yes, it is": "yes",
        "No.": "no",
        " no": "no",
        "Y": "yes",
        "n": "no",
        "It is. Yes": None,
        "": None,
    }
    assert {reply: yes_or_no(reply) for reply in said} == said


def test_answers_are_normalised_as_in_the_vqa_challenge():
    expected = {
        "The two dogs.": "2 dogs",
        "1,000": "1000",
        "dont": "don't",
        "couldn'tve": "couldn't've",
        "its": "its",
        "Joe's": "joe 's",
        "t-shirt": "t shirt",
        "t-shirt - red": "tshirt red",
        "right - hand": "right hand",
        "3.5 m.": "3.5 m",
        "U.S.": "us",
        "none": "0",
        "A\tcat\n": "cat",
    }
    assert {text: normalised(text) for text in expected} == expected


def test_plain_texts_keep_what_makes_a_number():
    expected = {
        "T-Shirt!": "tshirt",
        "-5": "-5",
        "1,200.50": "1200.50",
        "5-6": "5-6",
        "Yes.": "yes",
        "12 %": "12 %",
        "a, b": "a b",
        "Covid-19": "covid19",
    }
    assert {text: plain(text) for text in expected} == expected


def test_options_are_taken_out_of_a_question_only_where_they_are_a_list():
    assert split_options("Which?\nChoices:\n(A) x\n(B) y z") == ("Which?", ("x", "y z"))
    for text in ("Which?\nA. x", "Which?\nB. x\nC. y", "Is it\nA or B?"):
        assert split_options(text) == (text, None)


def test_accuracy_is_of_letters_where_there_are_options_and_of_text_elsewhere():
    assert accuracy(question(answers=("B",), choices=OPTIONS), "It is a black cat") == 1
    assert accuracy(question(answers=("B",), choices=OPTIONS), "cat") == 0
    assert accuracy(question(answers=("T-shirt",)), "t-shirt.") == 1
    assert accuracy(question(answers=("1.2",)), "1.20") == 1
    assert accuracy(question(answers=("1.2",)), "12") == 0
    assert accuracy(question(answers=("nan",)), "Nan") == 1


@pytest.mark.parametrize(("agree", "value"), [(0, 0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1), (10, 1)])
def test_soft_accuracy_leaves_each_of_ten_annotators_out_once(agree, value):
    answers = ("Coca-Cola",) * agree + tuple(f"other {n}" for n in range(10 - agree))
    assert soft_accuracy(question(answers=answers), "the coca cola") == pytest.approx(value)


def test_soft_accuracy_of_fewer_annotators_asks_whether_one_agrees():
    assert soft_accuracy(question(answers=("stop", "stop sign")), "Stop sign") == 1
    assert soft_accuracy(question(answers=("stop",)), "go") == 0


@pytest.mark.parametrize(
    ("reply", "answers", "value"),
    [
        ("Hello", ("hello",), 1),
        ("hallo", ("hello",), 0.8),  # one of five letters replaced
        ("helo", ("hello", "help me"), 0.8),  # one of five missing; the other answer is farther
        ("hello!", ("hello",), 1 - 1 / 6),
        ("ab", ("abcd",), 0.5),
        ("ab", ("abcde",), 0),  # 2 / 5, below the threshold
        ("kitten  cat", ("sitting cat",), 1 - 3 / 11),
    ],
)
def test_anls_is_one_minus_the_share_of_letters_to_change(reply, answers, value):
    assert anls(question(answers=answers), reply) == pytest.approx(value)


def test_the_rule_of_the_papers_code_is_literal():
    assert starts_with(question(answers=("yes",)), "yes, it is") == 1
    assert starts_with(question(answers=("yes",)), "Yes") == 0
    assert [starts_with(question(answers=("B",), choices=OPTIONS), reply) for reply in ("B. x", "(B) x", "b")] == [
        1,
        1,
        0,
    ]


def mme(subtasks=PERCEPTION, images=2) -> list[Question]:
    return [
        question(f"{subtask}/{image}/{answer}", (answer,), None, subtask, f"{subtask}/{image}")
        for subtask in subtasks
        for image in range(images)
        for answer in ("Yes", "No")
    ]


def test_mme_perception_adds_accuracy_and_that_of_whole_images():
    asked = mme()
    right = {one.id: f"{one.answer}, it is." for one in asked}
    assert score("MME-P", right, asked).value == 2000
    always_yes = score("MME-P", {one.id: "yes" for one in asked}, asked)
    assert always_yes.value == 500 and set(always_yes.per_subtask.values()) == {50}  # every second one, no whole image
    one_wrong = score("MME-P", right | {"OCR/0/No": "yes"}, asked)
    assert one_wrong.value == 1925  # OCR: 3 of 4 questions, 1 of 2 images
    assert one_wrong.per_subtask["OCR"] == 125 and one_wrong.per_subtask["count"] == 200


def test_mme_without_pairs_or_with_other_subtasks_is_refused():
    asked = mme()[1:]
    assert "not two questions" in refusal("MME-P", {one.id: "yes" for one in asked}, asked)
    asked = mme(("code_reasoning",))
    assert "'code_reasoning'" in refusal("MME-P", {one.id: "yes" for one in asked}, asked)


def test_circular_accuracy_asks_for_every_rotation():
    asked = [question(str(name), ("B",), OPTIONS) for name in (7, 1_000_007, 8, 1_000_008)]
    replies = dict(zip((one.id for one in asked), "BBBA", strict=True))
    assert score("MMBench", replies, asked).value == 75
    assert score("MMBench", replies, asked, metric="circular accuracy").value == 50
    assert "'x'" in refusal("MMBench", {"x": "B"}, [question("x", ("B",), OPTIONS)], metric="circular accuracy")


def test_a_score_says_how_each_subtask_did_and_how_many_replies_were_empty():
    asked = [question(str(n), ("A",), OPTIONS, "ab"[n % 2]) for n in range(4)]
    result = score("SQA-IMG", [("3", "A"), ("2", "A"), ("1", " "), ("0", "D")], asked)
    assert result == Score("accuracy", 50, {"a": 50, "b": 50}, 4, 1)
    for name in METRICS.keys() - {"MME perception"}:
        assert score("SQA-IMG", {one.id: "" for one in asked}, asked, metric=name).value == 0


def test_predictions_have_to_be_of_the_questions():
    asked = [question(str(n)) for n in range(6)]
    replies = {one.id: "yes" for one in asked}
    assert "none for '0', '1', '2' and 1 more of 6" in refusal("GQA", {"4": "yes", "5": "yes"}, asked)
    assert "'9' is no id" in refusal("GQA", replies | {"9": "yes"}, asked)
    assert "predictions: '3' occurs more than once" in refusal("GQA", [*replies.items(), ("3", "no")], asked)
    assert "questions: '0' occurs more than once" in refusal("GQA", replies, [*asked, asked[0]])
    assert "there are none" in refusal("GQA", {}, [])
    assert "'fluency' is unknown" in refusal("GQA", replies, asked, metric="fluency")


def test_the_averages_are_those_of_the_papers_table_2():
    table = {  # the row of MoAI: 595.6 / 8 and 634.7 / 9, MME-P counting 85.7
        **{"MMBench": 79.3, "MME-P": 1714.0, "SQA-IMG": 83.5, "AI2D": 78.6, "TextVQA": 67.8, "GQA": 70.2},
        **{"CV-Bench-2D": 71.2, "CV-Bench-3D": 59.3, "PhysBench": 39.1},
    }
    scores = {name: Score("", value, {}, 1, 0) for name, value in table.items()}
    assert paper_averages(scores) == pytest.approx((74.45, 70.52), abs=0.005)
    with pytest.raises(UserError, match="none for GQA;"):
        paper_averages({name: one for name, one in scores.items() if name != "GQA"})


def test_questions_of_a_closed_list_of_answers_are_labelled_and_the_others_counted():
    asked = [
        question("0", ("two", "2", "2")),
        question("1", ("three",)),
        question("2", ("B",), ("no", "Two.")),
        question("3", ("yes",)),
    ]
    examples = to_examples(asked, ("yes", "2"))
    assert [one.id for one in examples.questions] == ["0", "2", "3"] and examples.num_outside == 1
    assert examples.labels.dtype == np.int32 and examples.labels.tolist() == [1, 1, 0]
    assert to_examples(asked[2:3], ("A", "B")).labels.tolist() == [1]
    for answers, words in ((("2", "two"), "'2' and 'two' are the same"), (("maybe",), "none of 4 questions")):
        with pytest.raises(UserError, match=words):
            to_examples(asked, answers)
