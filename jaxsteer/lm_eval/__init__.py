"""Models with steering in EleutherAI's lm-evaluation-harness: `pip install jaxsteer[lm-eval]`, then

    python -m jaxsteer.lm_eval --tasks arc_easy --model_args pretrained=MODEL,steering=steering.safetensors

with the arguments of the harness's own `lm_eval`; or pass a `JaxsteerLM` as `model` to `lm_eval.simple_evaluate`.
"""

from jaxsteer.lm_eval.model import JaxsteerLM

__all__ = ["JaxsteerLM"]
