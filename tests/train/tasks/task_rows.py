"""A row of every named task, in its hub's columns, with the example that it must become, white space included."""

ROWS = {
    "boolq": (
        {"question": "do cats purr", "passage": "Cats purr when content.", "answer": True},
        "Is the answer to the question true or false, going by the passage?\n"
        "Passage: Cats purr when content.\nQuestion: do cats purr\n",
        "Answer: True.",
        "True",
        ("Answer: True.", "Answer: False."),
    ),
    "winogrande": (
        {
            "sentence": "The cup fell off the shelf since the _ was wet.",
            "option1": "cup",
            "option2": "shelf",
            "answer": "2",
        },
        "Which option fills the blank in the sentence?\n"
        "Sentence: The cup fell off the shelf since the _ was wet.\nOption1: cup\nOption2: shelf\n",
        "Answer: Option2.",
        "Option2",
        ("Answer: Option1.", "Answer: Option2."),
    ),
    "listops": (
        {"Source": "( ( ( [MAX 2 ) ( ( [MIN 3 ) 4 ) X ) ]", "Target": 3},
        "Work out the value of the list expression, a single digit, and write it as <answer>digit</answer>.\n"
        "[MAX 2 [MIN 3 4 ] ]\n",
        "<answer>3</answer>",
        "3",
        (),
    ),
    "gsm8k": (
        {
            "question": "Tom has 1,000 eggs and sells half.  How many?",
            "answer": "He sells 1000/2 = <<1000/2=500>>500.\n#### 500",
        },
        "Tom has 1,000 eggs and sells half.  How many?\n",
        "He sells 1000/2 = <<1000/2=500>>500.\nAnswer: 500",
        "500",
        (),
    ),
    "arc_challenge": (
        {
            "id": "a",
            "question": "Which is hot?",
            "choices": {"text": ["the sun", "ice."], "label": ["A", "B"]},
            "answerKey": "B",
        },
        "Choose the right answer to the question.\nQuestion: Which is hot?\n(A) the sun\n(B) ice.\n",
        "Answer: (B) ice.",
        "B",
        ("Answer: (A) the sun.", "Answer: (B) ice."),
    ),
    "arc_easy": (
        {
            "id": "a",
            "question": "Which is {cold}?",
            "choices": {"text": ["sun", "ice"], "label": ["1", "2"]},
            "answerKey": "2",
        },
        "Choose the right answer to the question.\nQuestion: Which is {cold}?\n(1) sun\n(2) ice\n",
        "Answer: (2) ice.",
        "2",
        ("Answer: (1) sun.", "Answer: (2) ice."),
    ),
    "openbookqa": (
        {
            "id": "7",
            "question_stem": "Plants need",
            "choices": {"text": ["light", "noise", "glue", "tin"], "label": ["A", "B", "C", "D"]},
            "answerKey": "A",
        },
        "Choose the right answer to the question.\nQuestion: Plants need\n(A) light\n(B) noise\n(C) glue\n(D) tin\n",
        "Answer: (A) light.",
        "A",
        ("Answer: (A) light.", "Answer: (B) noise.", "Answer: (C) glue.", "Answer: (D) tin."),
    ),
    "aqua": (
        {
            "question": "What is 7 times 3?",
            "options": ["A)20", "B)21", "C)22", "D)23", "E)24"],
            "rationale": "7 * 3 = 21.\nAnswer is B\n",
            "correct": "B",
        },
        "Work out the problem and choose the right answer.\nProblem: What is 7 times 3?\n"
        "(A) 20\n(B) 21\n(C) 22\n(D) 23\n(E) 24\n",
        "7 * 3 = 21.\nAnswer is B\nAnswer: B.",
        "B",
        ("Answer: A.", "Answer: B.", "Answer: C.", "Answer: D.", "Answer: E."),
    ),
    "mnli": (
        {"premise": "A dog runs.", "hypothesis": "An animal moves.", "label": 0, "idx": 5},
        "Does the premise entail the hypothesis, contradict it, or neither (neutral)?\n"
        "Premise: A dog runs.\nHypothesis: An animal moves.\n",
        "Answer: ENTAILMENT.",
        "ENTAILMENT",
        ("Answer: ENTAILMENT.", "Answer: NEUTRAL.", "Answer: CONTRADICTION."),
    ),
    "svamp": (
        {
            "ID": "c-1",
            "Body": "Ann has 8.5 pies.",
            "Question": "She eats 3. How many?",
            "Equation": "( 8.5 - 3.0 )",
            "Answer": "5.50",
        },
        "Ann has 8.5 pies.\nShe eats 3. How many?\n",
        "( 8.5 - 3.0 )\nAnswer: 5.5",
        "5.5",
        (),
    ),
    "mawps": (
        {"question": "Sam had 9 dimes and spent 2.", "answer": "9.0 - 2.0 #### 7.0"},
        "Question: Sam had 9 dimes and spent 2.\n",
        "9.0 - 2.0\nAnswer: 7",
        "7",
        (),
    ),
    "asdiv": (
        {
            "question": "Seven and two apples?",
            "chain": '<gadget id="calculator">7 + 2</gadget>\n<output>9</output>\n\n<result>9</result>',
            "result_float": 9.0,
        },
        "Seven and two apples?\n",
        "7 + 2 = 9\nAnswer: 9",
        "9",
        (),
    ),
    "hellaswag": (
        {
            "ind": 4,
            "activity_label": "Baking",
            "ctx": "A man mixes dough. He",
            "endings": ["flies away.", "bakes it.", "sings", "dives."],
            "label": "1",
        },
        "How does the text go on?\nBaking: A man mixes dough. He\n"
        "(A) flies away.\n(B) bakes it.\n(C) sings\n(D) dives.\n",
        "Answer: (B) bakes it.",
        "B",
        ("Answer: (A) flies away.", "Answer: (B) bakes it.", "Answer: (C) sings.", "Answer: (D) dives."),
    ),
    "piqa": (
        {"goal": "Cool a drink", "sol1": "Add ice", "sol2": "Add fire", "label": 0},
        "Which way reaches the goal?\nGoal: Cool a drink\n(A) Add ice\n(B) Add fire\n",
        "Answer: (A) Add ice.",
        "A",
        ("Answer: (A) Add ice.", "Answer: (B) Add fire."),
    ),
    "siqa": (
        {
            "context": "Kim won.",
            "question": "How does Kim feel?",
            "answerA": "sad",
            "answerB": "tired",
            "answerC": "proud",
            "label": "3",
        },
        "Choose the right answer to the question about the situation.\n"
        "Situation: Kim won.\nQuestion: How does Kim feel?\n(A) sad\n(B) tired\n(C) proud\n",
        "Answer: (C) proud.",
        "C",
        ("Answer: (A) sad.", "Answer: (B) tired.", "Answer: (C) proud."),
    ),
    "alpaca": (
        {"instruction": "Translate to French.", "input": "cat", "output": "chat"},
        "### Instruction:\nTranslate to French.\n\n### Input:\ncat\n\n### Response:\n",
        "chat",
        "chat",
        (),
    ),
}

CHAT = {
    "messages": [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello!"},
        {"role": "user", "content": "Bye"},
        {"role": "assistant", "content": "See you."},
    ]
}

INSTRUCTIONS = {
    "boolq": (
        {
            "instruction": "Please answer the following question with true or false, question: do cats purr?\n\n"
            "Answer format: true/false",
            "output": "the correct answer is true",
            "answer": "true",
        },
        ("the correct answer is true", "the correct answer is false"),
    ),
    "winogrande": (
        {
            "instruction": "Please choose the correct answer to fill in the blank to complete the given sentence: The "
            "cup fell as the _ was wet.\n\nOption1: cup Option2: shelf Answer format: option1/option2",
            "output": "the correct answer is option2",
            "answer": "option2",
        },
        ("the correct answer is option1", "the correct answer is option2"),
    ),
    "arc_challenge": (
        {
            "instruction": "Please choose the correct answer to the question: Which is hot?\n\nAnswer1: sun "
            "Answer2: ice Answer3: rain\n\nAnswer format: answer1/answer2/answer3",
            "output": "the correct answer is answer1",
            "answer": "answer1",
        },
        ("the correct answer is answer1", "the correct answer is answer2", "the correct answer is answer3"),
    ),
    "gsm8k": (
        {
            "instruction": "Note: 2 and 3 apples?",
            "input": "",
            "output": "2 + 3 = 5, so the answer is 5.",
            "answer": "5.0",
        },
        (),
    ),
}
"""The same tasks as rows of instructions, with the candidates they must give."""
