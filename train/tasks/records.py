"""The tasks that come by name: one record each."""

from __future__ import annotations

from train.data.listops import TEMPLATES
from train.tasks import readers
from train.tasks.record import Part, Record, Split

_ANSWERED = "Answer: {number}"
_CHOOSE = "Answer: ({label}) {sentence}"
_MULTIPLE = "Choose the right answer to the question.\nQuestion: {question}\n{options}\n"
_MULTIPLE_OTHERWISE = (
    "{question}\n\n{options}\n\nWhich of these is correct?\n",
    "Here is a question with several possible answers. Pick the one that fits.\n{question}\n{options}\n",
)
_PROBLEM_OTHERWISE = (
    "Solve this problem step by step.\n{question}\n",
    "Problem: {question}\nWork it out, then give the number.\n",
)
_OWN: dict[Split, Part] = {split: Part(split) for split in ("train", "validation", "test")}
_FROM_VALIDATION: dict[Split, Part] = {
    "train": Part("train"),
    "validation": Part("validation", (("keep", 0.5),)),
    "test": Part("validation", (("hold", 0.5),)),
}
_FROM_TEST: dict[Split, Part] = {
    "train": Part("train"),
    "validation": Part("test", (("hold", 0.2),)),
    "test": Part("test", (("keep", 0.2),)),
}


def _cut(split: str) -> dict[Split, Part]:
    """80 : 10 : 10, where the source has one split that can be used."""
    return {
        "train": Part(split, (("keep", 0.2),)),
        "validation": Part(split, (("hold", 0.2), ("keep", 0.5))),
        "test": Part(split, (("hold", 0.2), ("hold", 0.5))),
    }


TASKS: dict[str, Record] = {
    "boolq": Record(
        title="BoolQ",
        source="google/boolq",
        splits=_FROM_VALIDATION
        | {"validation": Part("validation", (("keep", 0.2),)), "test": Part("validation", (("hold", 0.2),))},
        columns=("passage", "question", "answer"),
        read=readers.boolq,
        prompt="Is the answer to the question true or false, going by the passage?\n"
        "Passage: {passage}\nQuestion: {question}\n",
        completion="Answer: {label}.",
        rule="truth",
        max_new_tokens=10,
        paraphrases=(
            "{passage}\n\nGiven this text, say True or False: {question}\n",
            "Read the text and answer with True or False.\nText: {passage}\nAsked: {question}\n",
        ),
    ),
    "winogrande": Record(
        title="Winogrande (debiased)",
        source="allenai/winogrande",
        subset="winogrande_debiased",
        splits=_FROM_VALIDATION,
        columns=("sentence", "option1", "option2", "answer"),
        read=readers.winogrande,
        prompt="Which option fills the blank in the sentence?\nSentence: {sentence}\n{options}\n",
        completion="Answer: {label}.",
        option="{label}: {text}",
        rule="label",
        max_new_tokens=8,
        paraphrases=(
            "{sentence}\nFill in the blank with one of these:\n{options}\n",
            "Choose what belongs in the place of the underscore.\n{sentence}\n{options}\n",
        ),
    ),
    "listops": Record(
        title="ListOps (Long Range Arena)",
        source="fengyang0317/listops-1000",
        splits=_OWN,
        columns=("Source", "Target"),
        read=readers.listops,
        prompt=TEMPLATES["tagged"][0],
        completion="<answer>{answer}</answer>",
        rule="tagged",
        max_new_tokens=10,
        paraphrases=(
            "{expression}\nWhat digit is this? Write <answer>digit</answer>.\n",
            "Evaluate the nested lists below and put the digit between <answer> and </answer>.\n{expression}\n",
        ),
    ),
    "gsm8k": Record(
        title="GSM8K",
        source="openai/gsm8k",
        subset="main",
        splits=_FROM_TEST,
        columns=("question", "answer"),
        read=readers.reasoned,
        prompt="{question}\n",
        completion="{reasoning}" + _ANSWERED,
        rule="number",
        max_new_tokens=100,
        paraphrases=_PROBLEM_OTHERWISE,
    ),
    "arc_challenge": Record(
        title="ARC-Challenge",
        source="allenai/ai2_arc",
        subset="ARC-Challenge",
        splits=_OWN,
        columns=("question", "choices", "answerKey"),
        read=readers.labelled("question"),
        prompt=_MULTIPLE,
        completion=_CHOOSE,
        rule="label",
        max_new_tokens=32,
        paraphrases=_MULTIPLE_OTHERWISE,
    ),
    "arc_easy": Record(
        title="ARC-Easy",
        source="allenai/ai2_arc",
        subset="ARC-Easy",
        splits=_OWN,
        columns=("question", "choices", "answerKey"),
        read=readers.labelled("question"),
        prompt=_MULTIPLE,
        completion=_CHOOSE,
        rule="label",
        max_new_tokens=32,
        paraphrases=_MULTIPLE_OTHERWISE,
    ),
    "openbookqa": Record(
        title="OpenBookQA",
        source="allenai/openbookqa",
        subset="main",
        splits=_OWN,
        columns=("question_stem", "choices", "answerKey"),
        read=readers.labelled("question_stem"),
        prompt=_MULTIPLE,
        completion=_CHOOSE,
        rule="label",
        max_new_tokens=32,
        paraphrases=_MULTIPLE_OTHERWISE,
    ),
    "aqua": Record(
        title="AQuA",
        source="deepmind/aqua_rat",
        subset="raw",
        splits=_OWN,
        columns=("question", "options", "rationale", "correct"),
        read=readers.aqua,
        prompt="Work out the problem and choose the right answer.\nProblem: {question}\n{options}\n",
        completion="{rationale}\nAnswer: {label}.",
        choice="Answer: {label}.",
        rule="last_label",
        max_new_tokens=256,
        paraphrases=(
            "{question}\n\n{options}\n\nThink it through, then name the letter.\n",
            "A question of mathematics with its possible answers follows. Explain and choose.\n{question}\n{options}\n",
        ),
    ),
    "mnli": Record(
        title="MNLI (matched)",
        source="nyu-mll/glue",
        subset="mnli_matched",
        splits=_cut("validation"),
        columns=("premise", "hypothesis", "label"),
        read=readers.mnli,
        prompt="Does the premise entail the hypothesis, contradict it, or neither (neutral)?\n"
        "Premise: {premise}\nHypothesis: {hypothesis}\n",
        completion="Answer: {label}.",
        rule="relation",
        max_new_tokens=10,
        paraphrases=(
            "{premise}\nIf that is so, is the following ENTAILMENT, NEUTRAL or CONTRADICTION?\n{hypothesis}\n",
            "Say ENTAILMENT, NEUTRAL or CONTRADICTION for these two.\nFirst: {premise}\nSecond: {hypothesis}\n",
        ),
    ),
    "svamp": Record(
        title="SVAMP",
        source="ChilleD/SVAMP",
        splits=_FROM_TEST,
        columns=("Body", "Question", "Equation", "Answer"),
        read=readers.svamp,
        prompt="{body}\n{question}\n",
        completion="{reasoning}" + _ANSWERED,
        rule="number",
        max_new_tokens=40,
        paraphrases=(
            "Give the equation and its result.\n{body} {question}\n",
            "Situation: {body}\nAsked: {question}\n",
        ),
    ),
    "mawps": Record(
        title="MAWPS",
        source="garrethlee/MAWPS",
        splits={
            "train": Part("train", (("keep", 0.1),)),
            "validation": Part("train", (("hold", 0.1),)),
            "test": Part("test"),
        },
        columns=("question", "answer"),
        read=readers.reasoned,
        prompt="Question: {question}\n",
        completion="{reasoning}" + _ANSWERED,
        rule="number",
        max_new_tokens=20,
        paraphrases=_PROBLEM_OTHERWISE,
    ),
    "asdiv": Record(
        title="ASDiv",
        source="MU-NLPC/Calc-asdiv_a",
        splits=_cut("test"),
        columns=("question", "chain", "result_float"),
        read=readers.asdiv,
        prompt="{question}\n",
        completion="{reasoning}" + _ANSWERED,
        rule="number",
        max_new_tokens=40,
        paraphrases=_PROBLEM_OTHERWISE,
    ),
    "hellaswag": Record(
        title="HellaSwag",
        source="Rowan/hellaswag",
        splits=_FROM_VALIDATION,
        columns=("activity_label", "ctx", "endings", "label"),
        read=readers.hellaswag,
        prompt="How does the text go on?\n{activity}: {context}\n{options}\n",
        completion=_CHOOSE,
        rule="label",
        max_new_tokens=64,
        paraphrases=(
            "{activity}: {context}\n\nChoose the best continuation.\n{options}\n",
            "A description breaks off ({activity}). Which ending belongs to it?\n{context}\n{options}\n",
        ),
    ),
    "piqa": Record(
        title="PIQA",
        source="ybisk/piqa",
        revision="refs/convert/parquet",
        splits=_FROM_VALIDATION,
        columns=("goal", "sol1", "sol2", "label"),
        read=readers.piqa,
        prompt="Which way reaches the goal?\nGoal: {goal}\n{options}\n",
        completion=_CHOOSE,
        rule="label",
        max_new_tokens=64,
        paraphrases=(
            "{goal}\nOne of these works:\n{options}\n",
            "Somebody wants to do this: {goal}\nChoose the sensible solution.\n{options}\n",
        ),
    ),
    "siqa": Record(
        title="SIQA",
        source="allenai/social_i_qa",
        revision="refs/convert/parquet",
        splits=_FROM_VALIDATION,
        columns=("context", "question", "answerA", "answerB", "answerC", "label"),
        read=readers.siqa,
        prompt="Choose the right answer to the question about the situation.\n"
        "Situation: {context}\nQuestion: {question}\n{options}\n",
        completion=_CHOOSE,
        rule="label",
        max_new_tokens=32,
        paraphrases=(
            "{context} {question}\n\n{options}\n",
            "Think about what people do and feel.\n{context}\n{question}\n{options}\n",
        ),
    ),
    "alpaca": Record(
        title="Instructions (Alpaca)",
        source="yahma/alpaca-cleaned",
        splits=_cut("train"),
        columns=("instruction", "output"),
        read=readers.alpaca,
        prompt="### Instruction:\n{instruction}\n\n{given}### Response:\n",
        completion="{output}",
        rule="exact",
        max_new_tokens=256,
        paraphrases=(
            "Instruction: {instruction}\n{given}Response:\n",
            "{instruction}\n\n{given}",
        ),
    ),
    "chat": Record(
        title="Conversations",
        source="HuggingFaceTB/smoltalk",
        subset="everyday-conversations",
        splits=_FROM_TEST,
        columns=("messages",),
        read=readers.conversation,
        prompt="",
        completion="",
        rule="exact",
        max_new_tokens=256,
    ),
}
"""Every task that comes by name."""
