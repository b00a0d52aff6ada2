"""Files of the programs that jaxsteer imports from, and what these programs compute with them.

    python make_interop_sources.py steerling|pyreft|saelens|pickles FOLDER

writes into FOLDER (tests/golden/interop/NAME) a folder for each case and answers.npz with `ids` int32 [2, 12] and
`CASE` fp32 [2, 12, V], the logits. The base is tests/golden/tiny_llama, and for one case tests/golden/families/gemma2.

pyreft      needs pyreft 0.1.0 and pyvene 0.1.8 (made with transformers 4.57.6, torch 2.14.1): pyreft saves and answers
saelens     needs sae-lens 6.54.12 and transformer-lens 3 (transformers 5.24.0, torch 2.13.0): SAELens saves the
            autoencoders, TransformerLens answers, with strength · W_dec[feature] added in a hook
steerling   needs torch and transformers (the same). steerling is not a package that can be installed: this is not its
            code, but a few lines that save a state with its names and shapes and steer at its places: the outputs of
            the block, of post_attention_layernorm ("attn") and of the MLP. All but `block` are saved without the base
            model's tensors, to be small.
pickles     needs torch: files that torch.save wrote of every kind of tensor, and their values in answers.npz
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM

GOLDEN = Path(__file__).resolve().parent
IDS = torch.tensor([[3, 41, 5, 77, 60, 12, 33, 90, 8, 8, 51, 24], [17, 2, 69, 31, 4, 96, 55, 10, 28, 63, 45, 7]])
RANK = 4


def load(name="tiny_llama"):
    """A base model, fp32."""
    return AutoModelForCausalLM.from_pretrained(GOLDEN / name, dtype=torch.float32).eval()


class LowRank(torch.nn.Module):
    """α · up(act(down(h)))."""

    def __init__(self, width, alpha, activation):
        super().__init__()
        self.down = torch.nn.Linear(width, RANK, bias=False)
        self.up = torch.nn.Linear(RANK, width, bias=False)
        self.alpha, self.activation = alpha, activation

    def forward(self, h):
        return self.alpha * self.up(self.activation(self.down(h)))


class Steered(torch.nn.Module):
    """A model and what steers it, by name: layer{i}_{target}."""

    def __init__(self, base, kind, targets, layers, alpha=1.0, activation=torch.nn.functional.silu):
        super().__init__()
        self.base_model = base
        width = base.config.hidden_size
        if kind == "deltas":
            self.deltas = torch.nn.ParameterDict()
        else:
            self.adapters = torch.nn.ModuleDict()
        for layer in layers:
            block = base.model.layers[layer]
            places = {"block": block, "attn": block.post_attention_layernorm, "mlp": block.mlp}
            for target in targets:
                name = f"layer{layer}_{target}"
                if kind == "deltas":
                    self.deltas[name] = torch.nn.Parameter(0.3 * torch.randn(width))
                    shift = lambda h, name=name: self.deltas[name]
                else:
                    self.adapters[name] = LowRank(width, alpha, activation)
                    torch.nn.init.normal_(self.adapters[name].down.weight, std=0.3)
                    torch.nn.init.normal_(self.adapters[name].up.weight, std=0.3)
                    shift = self.adapters[name]
                places[target].register_forward_hook(lambda module, inputs, output, shift=shift: output + shift(output))


def steerling(folder):
    """A whole state, submodules, fixed vectors, Gemma 2, and a joint folder of PEFT with a LoRA."""
    from peft import LoraConfig, get_peft_model
    from safetensors.torch import save_file

    linear, gelu = lambda h: h, torch.nn.functional.gelu
    cases = {
        "block": Steered(load(), "adapters", ("block",), (0, 1, 2)),
        "submodules": Steered(load(), "adapters", ("mlp", "attn"), (0, 2), 1.5, linear),
        "fixed": Steered(load(), "deltas", ("block", "attn"), (0, 1, 2)),
        "gemma2": Steered(load("families/gemma2"), "adapters", ("block", "attn"), (1,), 1.0, gelu),
    }
    out = {}
    for name, model in cases.items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        state = model.state_dict()
        if name != "block":
            state = {key: value for key, value in state.items() if not key.startswith("base_model.")}
        if name == "fixed":
            save_file(state, folder / name / "model.safetensors")
        else:
            torch.save(state, folder / name / "pytorch_model.bin")
        out[name] = model.base_model(IDS % model.base_model.config.vocab_size).logits
    config = LoraConfig(r=2, lora_alpha=3, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    steered = Steered(load(), "adapters", ("block",), (0, 1, 2), 0.5, torch.tanh)
    peft = get_peft_model(steered.base_model, config)
    for key, value in peft.named_parameters():
        if "lora_" in key:
            torch.nn.init.normal_(value, std=0.2)
    peft.eval()
    peft.save_pretrained(folder / "joint")
    (folder / "joint" / "README.md").unlink()
    settings = folder / "joint" / "adapter_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"base_model_name_or_path": None}, indent=2))
    torch.save(steered.adapters.state_dict(), folder / "joint" / "adapter_steerer.pt")
    out["joint"] = peft(IDS).logits
    return out


def pyreft(folder):
    """Every kind of intervention at two layers; the one in bf16 has no answer."""
    import pyreft

    kinds = {
        "loreft": (pyreft.LoreftIntervention, {}),
        "loreft_tanh": (pyreft.LoreftIntervention, {"act_fn": "tanh"}),
        "loreft_bf16": (pyreft.LoreftIntervention, {"dtype": torch.bfloat16}),
        "noreft": (pyreft.NoreftIntervention, {"add_bias": True}),
        "direft": (pyreft.DireftIntervention, {"act_fn": "relu"}),
        "nodireft": (pyreft.NodireftIntervention, {"add_bias": False, "act_fn": "silu"}),
        "consreft": (pyreft.ConsreftIntervention, {}),
        "lobireft": (pyreft.LobireftIntervention, {}),
    }
    out = {}
    for name, (kind, options) in kinds.items():
        model = load()
        parts = []
        for layer in (0, 2):
            options = {"embed_dim": 48, "low_rank_dimension": RANK, "dtype": torch.float32, **options}
            intervention = kind(**options)
            for key, value in intervention.named_parameters():
                if "original" not in key:
                    torch.nn.init.normal_(value, std=0.3)
            part = {"layer": layer, "component": "block_output", "low_rank_dimension": RANK}
            parts.append(part | {"intervention": intervention})
        reft = pyreft.get_reft_model(model, pyreft.ReftConfig(representations=parts))
        reft.eval()
        reft.save(str(folder / name), save_to_hf_hub=False)
        if name != "loreft_bf16":  # first:2+last:1
            where = [[[0, 1, IDS.shape[1] - 1]] * len(IDS)] * len(parts)
            answer = reft({"input_ids": IDS}, unit_locations={"sources->base": (None, where)})[1]
            out[name] = answer.logits
    return out


def saelens(folder):
    """An autoencoder of each place that is read, and one in bf16."""
    from sae_lens import JumpReLUSAE, JumpReLUSAEConfig, StandardSAE, StandardSAEConfig
    from transformer_lens import HookedTransformer, HookedTransformerConfig
    from transformer_lens.pretrained.weight_conversions import convert_llama_weights

    base = load()
    c = base.config
    config = HookedTransformerConfig(
        n_layers=c.num_hidden_layers,
        d_model=c.hidden_size,
        n_ctx=64,
        d_head=c.head_dim,
        n_heads=c.num_attention_heads,
        n_key_value_heads=c.num_key_value_heads,
        d_mlp=c.intermediate_size,
        d_vocab=c.vocab_size,
        act_fn="silu",
        eps=c.rms_norm_eps,
        normalization_type="RMS",
        final_rms=True,
        gated_mlp=True,
        positional_embedding_type="rotary",
        rotary_adjacent_pairs=False,
        rotary_dim=c.head_dim,
        rotary_base=10000,
        dtype=torch.float32,
    )
    config.original_architecture = "LlamaForCausalLM"
    model = HookedTransformer(config)
    model.load_state_dict(convert_llama_weights(base, config), strict=False)
    out = {"base": model(IDS)}
    assert torch.allclose(out["base"], base(IDS).logits, atol=1e-4)
    hooks = {"post": "blocks.1.hook_resid_post", "pre": "blocks.1.hook_resid_pre"}
    hooks |= {"mlp": "blocks.2.hook_mlp_out", "attn": "blocks.0.hook_attn_out", "bf16": "blocks.0.hook_resid_post"}
    for name, hook in hooks.items():
        dtype = "bfloat16" if name == "bf16" else "float32"
        kind, settings = (JumpReLUSAE, JumpReLUSAEConfig) if name == "pre" else (StandardSAE, StandardSAEConfig)
        sae = kind(settings(d_in=c.hidden_size, d_sae=10, dtype=dtype))
        sae.cfg.metadata.hook_name, sae.cfg.metadata.model_name = hook, "tiny"
        torch.nn.init.normal_(sae.W_dec, std=0.5)
        sae.save_model(folder / name)
        shift = -2.5 * type(sae).load_from_disk(folder / name).W_dec[7].float()
        out[name] = model.run_with_hooks(IDS, fwd_hooks=[(hook, lambda value, hook, shift=shift: value + shift)])
    return out


def pickles(folder):
    """Types, views, scalars and parameters, by two pickle protocols and in the form before PyTorch 1.6."""
    matrix = torch.randn(5, 4)
    tensors = {
        "f32": matrix,
        "f64": torch.randn(3, dtype=torch.float64),
        "f16": torch.randn(2, 3).half(),
        "bf16": torch.randn(2, 3).bfloat16(),
        "i64": torch.tensor(7),
        "bool": torch.tensor([True, False]),
        "transposed": matrix.T,
        "part": matrix[1:3, 1:],
        "empty": torch.zeros(0, 3),
        "parameter": torch.nn.Parameter(torch.randn(2)),
    }
    torch.save(tensors, folder / "protocol_2.bin")
    torch.save(tensors, folder / "protocol_4.bin", pickle_protocol=4)
    torch.save({"f32": matrix}, folder / "legacy.bin", _use_new_zipfile_serialization=False)
    return tensors


def main(name, folder):
    """Compute and store."""
    torch.manual_seed(0)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with torch.no_grad():
        out = globals()[name](folder)
    answers = {case: value.detach().float().numpy() for case, value in out.items()}
    np.savez_compressed(folder / "answers.npz", ids=IDS.numpy().astype(np.int32), **answers)


if __name__ == "__main__":
    main(*sys.argv[1:])
