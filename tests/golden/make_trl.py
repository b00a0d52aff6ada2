"""The losses of TRL's own trainers on preferences, judgements and rewards, and their gradients, on the tiny Llama.

    python make_trl.py FOLDER

writes trl.npz into FOLDER. The policy is `tiny_llama` with the LoRA of `reference.npz` at the down projections alone;
the reference is `tiny_llama`. Each trainer is built as anybody builds it and is asked for its loss of one batch of
token ids that are drawn here; its data set and its reward function are never used. Needs trl, transformers, peft and
torch.
"""

import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from peft import LoraConfig
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, KTOConfig, KTOTrainer
from trl.experimental.cpo import CPOConfig, CPOTrainer

HERE = Path(__file__).parent
VOCABULARY = 97
PROMPTS = (4, 3, 6, 5)
LEVEL = 3
ANSWERS = {
    "chosen": (3, 5, 1, 4),
    "rejected": (4, 2, 6, 4),
    "level_chosen": (LEVEL,) * 4,
    "level_rejected": (LEVEL,) * 4,
}
LONGEST = 8
BETA, SIMPO_BETA, SIMPO_MARGIN = 0.3, 2.0, 0.5
DESIRABLE_WEIGHT, UNDESIRABLE_WEIGHT = 1.5, 0.5
CLIP_LOW, CLIP_HIGH, GRPO_BETA = 0.05, 0.1, 0.2

ROW = {"prompt": "t5", "chosen": "t6", "rejected": "t7", "completion": "t6", "label": True}
COLUMNS = {KTOTrainer: ("prompt", "completion", "label"), GRPOTrainer: ("prompt",)}


def trainer_of(kind, config, **settings):
    """A trainer of the tiny Llama with the LoRA, in evaluation mode: no dropout, no accumulation."""
    words = {f"t{i}": i for i in range(VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="t0"))
    rows = [{name: ROW[name] for name in COLUMNS.get(kind, ("prompt", "chosen", "rejected"))}] * 8
    rewards = {"reward_funcs": lambda completions, **_: [0.0] * len(completions)} if kind is GRPOTrainer else {}
    with tempfile.TemporaryDirectory() as folder:
        trainer = kind(
            model=AutoModelForCausalLM.from_pretrained(HERE / "tiny_llama", dtype=torch.float32),
            args=config(output_dir=folder, use_cpu=True, report_to=[], bf16=False, **settings),
            train_dataset=Dataset.from_list(rows),
            processing_class=PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="t0", eos_token="t2"),
            peft_config=LoraConfig(r=4, lora_alpha=6, target_modules=["down_proj"], task_type="CAUSAL_LM"),
            **rewards,
        )
    known = np.load(HERE / "reference.npz")
    for name, parameter in trained(trainer).items():
        parameter.data.copy_(torch.tensor(known[f"peft/lora/param/{name}"]))
    trainer.model.eval()
    return trainer


def trained(trainer):
    """The LoRA's parameters, by peft's names."""
    return {name: parameter for name, parameter in trainer.model.named_parameters() if parameter.requires_grad}


def record(out, case, trainer, loss):
    """The loss, and its gradients."""
    leaves = trained(trainer)
    out[f"{case}/loss"] = np.float32(loss.item())
    for name, grad in zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True):
        out[f"{case}/grad/{name}"] = grad.numpy()


def right_padded(prompts, answers):
    """Prompts followed by answers: ids, the mask of all tokens, that of the answers; int64 [B, T]."""
    texts = [(prompt, prompt + answer) for prompt, answer in zip(prompts, answers, strict=True)]
    width = max(len(whole) for _, whole in texts)
    ids, mask, counted = (torch.zeros(len(texts), width, dtype=torch.long) for _ in range(3))
    for i, (prompt, whole) in enumerate(texts):
        ids[i, : len(whole)] = torch.tensor(whole)
        mask[i, : len(whole)], counted[i, len(prompt) : len(whole)] = 1, 1
    return ids, mask, counted


def padded(sequences, width, *, left=False):
    """Token ids and their mask, int64 [B, width]."""
    ids, mask = (torch.zeros(len(sequences), width, dtype=torch.long) for _ in range(2))
    for i, sequence in enumerate(sequences):
        part = slice(width - len(sequence), width) if left else slice(0, len(sequence))
        ids[i, part], mask[i, part] = torch.tensor(sequence), 1
    return ids, mask


def dpo(out, prompts, answers):
    """IPO's answers are of one length: TRL takes the mean over tokens where the paper has a sum."""
    for case, kind in (("sigmoid", ""), ("ipo", "level_")):
        trainer = trainer_of(DPOTrainer, DPOConfig, loss_type=[case], beta=BETA)
        fields = right_padded(prompts * 2, answers[f"{kind}chosen"] + answers[f"{kind}rejected"])
        inputs = dict(zip(("input_ids", "attention_mask", "completion_mask"), fields, strict=True))
        record(out, case, trainer, trainer.compute_loss(trainer.model, inputs))


def simpo(out, prompts, answers):
    settings = {"loss_type": "simpo", "cpo_alpha": 0.0, "beta": SIMPO_BETA, "simpo_gamma": SIMPO_MARGIN}
    trainer = trainer_of(CPOTrainer, CPOConfig, **settings)
    inputs = {}
    for name in ("chosen", "rejected"):
        ids, mask, counted = right_padded(prompts, answers[name])
        labels = ids.masked_fill(counted == 0, -100)
        inputs |= {f"{name}_input_ids": ids, f"{name}_attention_mask": mask, f"{name}_labels": labels}
    record(out, "simpo", trainer, trainer.compute_loss(trainer.model, inputs))


def kto(out, prompts, answers):
    """The chosen answers are desirable, the others are not; each prompt has the next answer as its mismatched one. In
    the second case the LoRA has the other sign: one reference point is above 0, the other is not."""
    both = answers["chosen"] + answers["rejected"]
    weights = {"desirable_weight": DESIRABLE_WEIGHT, "undesirable_weight": UNDESIRABLE_WEIGHT}
    inputs = {"label": torch.tensor([True] * len(prompts) + [False] * len(prompts))}
    for prefix, own in (("", both), ("KL_", both[1:] + both[:1])):
        names = (f"{prefix}{name}" for name in ("input_ids", "attention_mask", "completion_mask"))
        inputs |= dict(zip(names, right_padded(prompts * 2, own), strict=True))
    for case, sign in (("kto", 1), ("kto_turned", -1)):
        trainer = trainer_of(KTOTrainer, KTOConfig, beta=BETA, **weights)
        for name, parameter in trained(trainer).items():
            parameter.data.mul_(sign if "lora_B" in name else 1)
        record(out, case, trainer, trainer.compute_loss(trainer.model, inputs))
        out[f"{case}/point"] = np.float32(trainer._metrics["eval"]["kl"][0])


def grpo(out, prompts, answers):
    """The policy that sampled is the policy with noise in its log-probabilities, so that ratios are clipped on both
    sides. TRL would weight the KL by the ratio, which the paper does not."""
    ids, mask = padded(prompts * 2, max(PROMPTS), left=True)
    answer_ids, answer_mask = padded(answers["chosen"] + answers["rejected"], LONGEST)
    out["advantages"] = np.random.default_rng(1).standard_normal(len(ids)).astype(np.float32)
    noise = np.random.default_rng(2).normal(0, 0.2, answer_ids.shape).astype(np.float32)
    for case in ("grpo", "dapo", "dr_grpo"):
        trainer = trainer_of(
            GRPOTrainer,
            GRPOConfig,
            loss_type=case,
            beta=GRPO_BETA,
            epsilon=CLIP_LOW,
            epsilon_high=CLIP_HIGH,
            use_bias_correction_kl=False,
            num_generations=2,
            max_completion_length=LONGEST,
        )
        whole = torch.cat([ids, answer_ids], 1), torch.cat([mask, answer_mask], 1)
        score = lambda: trainer._get_per_token_logps_and_entropies(trainer.model, *whole, LONGEST)[0].detach()  # noqa: B023
        old = score() + torch.tensor(noise)
        with trainer.model.disable_adapter():
            reference = score()
        inputs = {
            "prompt_ids": ids,
            "prompt_mask": mask,
            "completion_ids": answer_ids,
            "completion_mask": answer_mask,
            "advantages": torch.tensor(out["advantages"]),
            "old_per_token_logps": old,
            "ref_per_token_logps": reference,
            "num_items_in_batch": answer_mask.sum(),
        }
        record(out, case, trainer, trainer.compute_loss(trainer.model, inputs))
        clipped = {side: trainer._metrics["eval"][f"clip_ratio/{side}_mean"][0] for side in ("low", "high")}
        out[f"{case}/clipped"] = np.array(list(clipped.values()), np.float32)
        out["old"] = old.numpy()


def main(folder):
    draw = np.random.default_rng(0)
    some = lambda lengths: [draw.integers(3, VOCABULARY, length).tolist() for length in lengths]
    prompts, answers = some(PROMPTS), {name: some(lengths) for name, lengths in ANSWERS.items()}
    out = {"prompts": padded(prompts, max(PROMPTS))[0].numpy().astype(np.int32)}
    out |= {name: padded(each, LONGEST)[0].numpy().astype(np.int32) for name, each in answers.items()}
    for losses in (dpo, simpo, kto, grpo):
        losses(out, prompts, answers)
    np.savez_compressed(Path(folder) / "trl.npz", **out)


if __name__ == "__main__":
    main(sys.argv[1])
