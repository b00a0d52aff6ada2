"""How to load each format with the programs that it is for, as its model card says it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Use:
    """What a format is to those who use it.

    programs  that it is for
    library   its name as a library on the Hugging Face Hub
    relation  to the base model there: adapter or finetune; "" = none of those that the Hub knows
    code      that loads it; FOLDER and BASE stand for this folder and the base model
    language  of the code
    tags      for the Hub
    needs     what has to be known besides, a sentence; ""
    """

    programs: str
    library: str
    relation: str
    code: str
    language: str = "python"
    tags: tuple[str, ...] = ()
    needs: str = ""

    def how_to_load(self, base: str | None) -> str:
        """The code, with this base model's id if it is known, and what does the same in jaxsteer."""
        code = self.code if base is None else self.code.replace("BASE", base)
        names = "`FOLDER` is the id of this repository, or where you have put it"
        if "BASE" in code:
            names += "; `BASE` is the base model, as a folder, a file or an id"
        parts = [f"{names}. {self.needs}".strip(), _block(code, self.language)]
        return "\n\n".join(parts if code == JAXSTEER else [*parts, "In jaxsteer:", _block(JAXSTEER, "python")])


def _block(code: str, language: str) -> str:
    return f"```{language}\n{code}\n```"


JAXSTEER = """\
import jaxsteer
steered = jaxsteer.load("FOLDER")
hidden = jaxsteer.forward(steered.model, steered.base, steered.steering, batch).hidden"""

_TRANSFORMERS = """\
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained("FOLDER", dtype="auto"{more})"""

_GGUF = "`MODEL.gguf` is the base model in GGUF."

USES: dict[str, Use] = {
    "jaxsteer": Use("jaxsteer", "jaxsteer", "adapter", JAXSTEER),
    "peft": Use(
        "peft and what reads its adapters",
        "peft",
        "adapter",
        """\
from peft import PeftModel
from transformers import AutoModelForCausalLM
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("BASE"), "FOLDER")""",
        tags=("lora",),
    ),
    "hf": Use("transformers", "transformers", "finetune", _TRANSFORMERS.format(more="")),
    "hf-steered": Use(
        "transformers and vLLM",
        "transformers",
        "finetune",
        _TRANSFORMERS.format(more=", trust_remote_code=True"),
        tags=("custom_code",),
        needs="The folder has code of its own, which computes the steering: without it, loading fails.",
    ),
    "hf-steerable": Use(
        "vLLM and transformers",
        "transformers",
        "",
        "vllm serve FOLDER --trust-remote-code --enable-lora --max-lora-rank 16 --max-loras 4",
        "bash",
        tags=("custom_code", "vllm"),
        needs="Alone it is the base model: adapters over it are the steering. `--max-lora-rank` is at least the `r` in "
        "their adapter_config.json.",
    ),
    "vllm": Use(
        "vLLM and peft",
        "peft",
        "adapter",
        "vllm serve STEERABLE --trust-remote-code --enable-lora --max-lora-rank 16 --lora-modules steered=FOLDER",
        "bash",
        tags=("lora", "vllm"),
        needs="`STEERABLE` is the folder of the steerable base that it was written over. `--max-lora-rank` is at "
        "least the `r` in adapter_config.json. Requests ask for the model `steered`.",
    ),
    "adapters": Use(
        "adapters",
        "adapter-transformers",
        "adapter",
        """\
import adapters
from transformers import AutoModelForCausalLM
adapters.init(model := AutoModelForCausalLM.from_pretrained("BASE"))
model.load_adapter("FOLDER", set_active=True)""",
        tags=("adapters",),
    ),
    "gguf": Use(
        "llama.cpp and Ollama", "gguf", "finetune", 'llama-cli -m FOLDER/model.gguf -p "Hello"', "bash", tags=("gguf",)
    ),
    "gguf-lora": Use(
        "llama.cpp",
        "gguf",
        "adapter",
        'llama-cli -m MODEL.gguf --lora FOLDER/adapter.gguf -p "Hello"',
        "bash",
        tags=("gguf", "lora"),
        needs=_GGUF,
    ),
    "gguf-control": Use(
        "llama.cpp",
        "gguf",
        "adapter",
        'llama-cli -m MODEL.gguf --control-vector FOLDER/control.gguf -p "Hello"',
        "bash",
        tags=("gguf", "control-vector"),
        needs=_GGUF,
    ),
    "mlx": Use(
        "MLX",
        "mlx",
        "adapter",
        """\
from mlx_lm import load
model, tokenizer = load("BASE", adapter_path="FOLDER")""",
        tags=("mlx", "lora"),
    ),
}
"""What each format that is written is used with, by name."""
