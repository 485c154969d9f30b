"""The benchmarks and reference sets of R2-T2 (arXiv 2502.20395, table 1): one row says where one is and how to read it.

    from experiments.r2t2 import scoring
    from experiments.r2t2.questions import Questions, ReadConfig

    references = Questions(ReadConfig(benchmark="CLEVR"))  # 5,000 drawn at random, from the Hub
    asked = list(Questions(ReadConfig(benchmark="MME-P", source="mme/", columns={"source": "image_id"})))  # local files
    replies = {question.id: answer(question.image.pixels(), question.text) for question in asked}
    print(scoring.score("MME-P", replies, asked))  # Score(metric="MME perception", value=1714.0, ...)
    examples = scoring.to_examples(references, answers=("yes", "no", "0", "1", "2"))  # labels for a closed model

Rows were written without a download: `known_from` says on what their Hub names and columns rest. A column called
otherwise is mapped by `ReadConfig.columns`, and a local table with the same columns serves in place of the Hub. The
organisation lmms-lab moved its image datasets to lmms-lab-encoder in July 2026.

Where the paper's sizes cannot be those of a public labelled split we take the split that is: TextVQA's 5,734 is the
test split, whose answers are hidden, and MathVista has public answers for 1,000 of its 6,141 questions.
"""

import dataclasses
from typing import Literal

from experiments.cli import UserError

Task = Literal["general visual", "knowledge", "OCR"]
REFERENCE_LIMIT = 5000  # "a random 5,000" of every reference set
PERCEPTION = (
    *("existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark", "artwork", "OCR"),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Columns:
    """Names of the columns of a table; a dot reaches into a nested one, None says that there is none.

    Attributes:
      image: encoded bytes, a {bytes, path} struct, a path, base64, or a list of one of these.
      question: what is asked.
      answer: the answer, or a list of what annotators said, as strings or as dicts with a key "answer".
      choices: a list, one column for each option, or the question's own column where options are lines "A. ..." of it.
      id: what predictions refer to; None counts rows from 0.
      source: what the image came from; None takes the checksum of its bytes.
      subtask: by what scores are split.
      hint: text to be read before the question.
      group: the column whose value has to be one of Benchmark.keep.
    """

    image: str = "image"
    question: str = "question"
    answer: str = "answer"
    choices: str | tuple[str, ...] | None = None
    id: str | None = None
    source: str | None = None
    subtask: str | None = None
    hint: str | None = None
    group: str | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Benchmark:
    """A benchmark or reference set.

    Attributes:
      name: as the paper calls it.
      task: the paper's task type; references serve the benchmarks of their own type.
      metric: the row of scoring.METRICS by which replies are judged.
      hub: dataset on the Hugging Face Hub; None where there is none that loads as a table.
      subset: configuration of the Hub dataset.
      split: a split whose answers are public.
      columns: where things stand.
      answer: whether the answer column holds an option's letter, its index from 0, or text.
      keep: values of columns.group that belong to the benchmark; empty keeps all.
      turns: column of {user, assistant} dialogues, which stand for question and answer columns in tables that have it.
      image_subset: configuration with columns (id, image) where columns.image holds an id into it.
      corpus: the collection whose images columns.source numbers, so that equal sources mean equal images across rows.
      limit: how many questions are drawn; None takes all.
      known_from: "card" (the Hub's own description), "code" (public code that reads it) or "memory".
      home: where to get it if not from the Hub.
    """

    name: str
    task: Task
    metric: str
    hub: str | None
    subset: str | None = None
    split: str
    columns: Columns = Columns()
    answer: Literal["letter", "index", "text"] = "text"
    keep: tuple[str, ...] = ()
    turns: str | None = None
    image_subset: str | None = None
    corpus: str | None = None
    limit: int | None = None
    known_from: Literal["card", "code", "memory"]
    home: str = ""


BENCHMARKS = (
    Benchmark(
        name="MMBench",
        task="general visual",
        metric="accuracy",
        hub="lmms-lab-encoder/MMBench",
        subset="en",
        split="dev",
        columns=Columns(id="index", choices=("A", "B", "C", "D"), subtask="category", hint="hint"),
        answer="letter",
        known_from="card",
    ),
    Benchmark(
        name="MME-P",
        task="general visual",
        metric="MME perception",
        hub="lmms-lab-encoder/MME",
        split="test",
        # question_id names the image: both questions of an image share it
        columns=Columns(source="question_id", subtask="category", group="category"),
        keep=PERCEPTION,
        corpus="mme",
        known_from="card",
    ),
    Benchmark(
        name="SQA-IMG",
        task="knowledge",
        metric="accuracy",
        hub="lmms-lab-encoder/ScienceQA",
        subset="ScienceQA-IMG",
        split="test",
        columns=Columns(choices="choices", subtask="subject", hint="hint"),
        answer="index",
        known_from="card",
    ),
    Benchmark(
        name="AI2D",
        task="knowledge",
        metric="accuracy",
        hub="lmms-lab-encoder/ai2d",
        split="test",
        columns=Columns(choices="options"),
        answer="index",
        known_from="code",
    ),
    Benchmark(
        name="TextVQA",
        task="OCR",
        metric="soft accuracy",
        hub="lmms-lab-encoder/textvqa",
        split="validation",
        columns=Columns(id="question_id", answer="answers", source="image_id"),
        corpus="openimages",
        known_from="card",
    ),
    Benchmark(
        name="GQA",
        task="general visual",
        metric="accuracy",
        hub="lmms-lab-encoder/GQA",
        subset="testdev_balanced_instructions",
        split="testdev",
        columns=Columns(id="id", image="imageId", source="imageId"),
        image_subset="testdev_balanced_images",
        corpus="visual genome",
        known_from="code",
    ),
    Benchmark(
        name="CV-Bench-2D",
        task="general visual",
        metric="accuracy",
        hub="nyu-visionx/CV-Bench",
        subset="2D",
        split="test",
        columns=Columns(id="idx", choices="choices", subtask="task", group="type"),
        answer="letter",
        keep=("2D",),
        known_from="code",
    ),
    Benchmark(
        name="CV-Bench-3D",
        task="general visual",
        metric="accuracy",
        hub="nyu-visionx/CV-Bench",
        subset="3D",
        split="test",
        columns=Columns(id="idx", choices="choices", subtask="task", group="type"),
        answer="letter",
        keep=("3D",),
        known_from="code",
    ),
    Benchmark(
        name="PhysBench",
        task="knowledge",
        metric="accuracy",
        hub=None,
        split="test",
        columns=Columns(id="idx", image="file_name", choices="question", subtask="task_type", group="mode"),
        answer="letter",
        keep=("image-only",),
        known_from="code",
        home="join test.json and test_answer.json of USC-GVL/PhysBench by idx, with images= its unpacked image.zip",
    ),
)

CAULDRON = "HuggingFaceM4/the_cauldron"  # one subset per dataset; its answers are public, its splits are all "train"

REFERENCE_SETS = (
    Benchmark(
        name="VQA-V2",
        task="general visual",
        metric="soft accuracy",
        hub="lmms-lab-encoder/VQAv2",
        split="validation",
        columns=Columns(id="question_id", answer="answers", source="image_id", subtask="answer_type"),
        corpus="coco",
        limit=REFERENCE_LIMIT,
        known_from="code",
    ),
    Benchmark(
        name="Visual7W",
        task="general visual",
        metric="accuracy",
        hub=CAULDRON,
        subset="visual7w",
        split="train",
        columns=Columns(choices="choices"),
        turns="texts",
        limit=REFERENCE_LIMIT,
        known_from="code",
    ),
    Benchmark(
        name="COCO-QA",
        task="general visual",
        metric="accuracy",
        hub=CAULDRON,
        subset="cocoqa",
        split="train",
        turns="texts",
        limit=REFERENCE_LIMIT,
        known_from="memory",
    ),
    Benchmark(
        name="CLEVR",
        task="general visual",
        metric="accuracy",
        hub=CAULDRON,
        subset="clevr",
        split="train",
        # the columns of CLEVR_v1.0/questions/CLEVR_val_questions.json, whose images are in CLEVR_v1.0/images/val
        columns=Columns(id="question_index", image="image_filename", source="image_filename"),
        turns="texts",
        corpus="clevr",
        limit=REFERENCE_LIMIT,
        known_from="memory",
    ),
    Benchmark(
        name="A-OKVQA",
        task="knowledge",
        metric="accuracy",
        hub="HuggingFaceM4/A-OKVQA",
        split="train",
        columns=Columns(id="question_id", choices="choices", answer="correct_choice_idx"),
        answer="index",
        limit=REFERENCE_LIMIT,
        known_from="code",
    ),
    Benchmark(
        name="TQA",
        task="knowledge",
        metric="accuracy",
        hub=CAULDRON,
        subset="tqa",
        split="train",
        columns=Columns(choices="choices"),
        turns="texts",
        limit=REFERENCE_LIMIT,
        known_from="memory",
    ),
    Benchmark(
        name="MathVista",
        task="knowledge",
        metric="accuracy",
        hub="AI4Math/MathVista",
        split="testmini",
        columns=Columns(id="pid", image="decoded_image", choices="choices", subtask="metadata.task"),
        limit=REFERENCE_LIMIT,
        known_from="code",
    ),
    Benchmark(
        name="ST-VQA",
        task="OCR",
        metric="ANLS",
        hub=CAULDRON,  # lmms-lab-encoder/ST-VQA has the test split alone, whose answers are hidden
        subset="st_vqa",
        split="train",
        # the columns of the challenge's own train_task_3.json
        columns=Columns(id="question_id", image="file_path", answer="answers", source="file_path"),
        turns="texts",
        corpus="st-vqa",
        limit=REFERENCE_LIMIT,
        known_from="memory",
    ),
    Benchmark(
        name="DocVQA",
        task="OCR",
        metric="ANLS",
        hub="lmms-lab-encoder/DocVQA",
        subset="DocVQA",
        split="validation",
        columns=Columns(id="questionId", answer="answers", source="ucsf_document_id"),
        corpus="ucsf",
        limit=REFERENCE_LIMIT,
        known_from="card",
    ),
)


def find(name: str) -> Benchmark:
    """Returns the row of that name.

    Raises:
      UserError: there is none.
    """
    rows = {row.name: row for row in (*BENCHMARKS, *REFERENCE_SETS)}
    if name not in rows:
        raise UserError(f"benchmark: {name!r} is unknown; choose one of {', '.join(rows)}.")
    return rows[name]
