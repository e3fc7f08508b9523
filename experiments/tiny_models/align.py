"""End-to-end alignment: answer-only cross entropy through the frozen language model and a low-rank adapter."""

from __future__ import annotations

import argparse
import logging
import math
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn

from masq.models.zoo import smol_omni

from . import architecture, logs, pools, prompts, prose
from . import constants as C
from .scenes import Scenes

log = logging.getLogger(__name__)


class Adapted(nn.Module):
    """A frozen linear plus a low-rank product that can be switched off."""

    enabled = True

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.linear = linear
        self.down = nn.Parameter(torch.randn(C.RANK, linear.in_features) / math.sqrt(linear.in_features))
        self.up = nn.Parameter(torch.zeros(linear.out_features, C.RANK))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.linear(x)
        if Adapted.enabled:
            y = y + F.linear(F.linear(x, self.down.to(x.dtype)), self.up.to(x.dtype))
        return y


def build(dtype: torch.dtype) -> tuple[nn.Module, nn.ModuleDict, nn.ModuleDict]:
    """The frozen thinker with adapters, the adapters by name, and the towers in float32."""
    from transformers import Qwen2_5OmniThinkerForConditionalGeneration
    from transformers.initialization import no_init_weights

    with no_init_weights():
        model = Qwen2_5OmniThinkerForConditionalGeneration(architecture.thinker_config())
    model.load_state_dict(smol_omni.language_state(smol_omni.language_file()), strict=False)
    model.tie_weights()
    towers = architecture.towers()
    del model.model.visual, model.model.audio_tower
    model = model.to(dtype).eval().requires_grad_(False)
    torch.manual_seed(C.SEED + 1)
    adapters = nn.ModuleDict()
    for index, layer in enumerate(model.model.language_model.layers):
        if index < C.ADAPTED_FROM:
            continue
        for short, path in smol_omni.ADAPTED.items():
            parent = layer.get_submodule(path.rpartition(".")[0])
            name = path.rpartition(".")[2]
            adapted = Adapted(getattr(parent, name))
            setattr(parent, name, adapted)
            adapters[f"{index}_{short}"] = adapted
    return model, adapters, towers


class Alignment:
    """Model, adapters, towers and the two optimiser groups."""

    def __init__(self, folder: Path, steps: int, second: bool = False) -> None:
        """Build, or resume from the last checkpoint; without one, take the towers of the warm-up.

        The ``second`` alignment goes on from the end of the first, with polished towers.
        """
        self.folder, self.steps, self.step = folder, steps, 0
        self.begin = C.ALIGN_STEPS if second else 0
        self.dtype = architecture.compute_dtype()
        self.model, self.adapters, self.towers = build(self.dtype)
        self.core = self.model.model
        self.tokenizer = smol_omni.build_tokenizer(smol_omni.language_file())
        self.parameters = {n: p for n, p in self.adapters.named_parameters() if "linear" not in n}
        self.resume()
        groups = [
            {"params": list(self.parameters.values()), "peak": C.RATE_ADAPTER, "from": 0},
            {"params": list(self.towers.parameters()), "peak": C.RATE_TOWER, "from": C.TOWERS_FROM},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.98), weight_decay=0.0, fused=True)
        self.passages = [
            p
            for kind in C.PROSE_KINDS
            for p in prose.passages(kind, "train", self.tokenizer, C.TRAINING_PASSAGE_TOKENS)
        ]

    @property
    def towers_learn(self) -> bool:
        """Whether gradients reach the towers at the present step."""
        return self.step >= C.TOWERS_FROM

    def resume(self) -> None:
        """Everything from the last alignment checkpoint, or towers from the warm-up."""
        file = self.folder / "align.safetensors"
        if file.exists():
            state = load_file(file)
            self.step = int(state.pop("step"))
            self.adapters.load_state_dict({k[9:]: v for k, v in state.items() if k[:9] == "adapters."}, strict=False)
            self.towers.load_state_dict({k[7:]: v for k, v in state.items() if k[:7] == "towers."})
            log.info("resumed at step %d", self.step)
            if self.step > self.begin or not self.begin:
                return
        kind = "polish" if self.begin else "warm"
        for name, target in (("vision", "visual"), ("audio", "audio_tower")):
            state = load_file(self.folder / f"{kind}_{name}.safetensors")
            self.towers[target].load_state_dict({k[6:]: v for k, v in state.items() if k[:6] == "tower."})

    def save(self) -> None:
        """Write weights and step atomically."""
        state = {f"adapters.{n}": p.detach().contiguous() for n, p in self.parameters.items()}
        state |= {f"towers.{n}": p.detach().contiguous() for n, p in self.towers.state_dict().items()}
        part = self.folder / "align.part"
        save_file(state | {"step": torch.tensor(self.step)}, part)
        part.replace(self.folder / "align.safetensors")

    def features(self, kind: str, inputs: torch.Tensor) -> torch.Tensor:
        """Projected tokens of pictures or clips."""
        learning = torch.is_grad_enabled() and self.towers_learn
        with torch.set_grad_enabled(learning), torch.autocast("cpu", torch.bfloat16, self.dtype == torch.bfloat16):
            if kind == "image":
                return architecture.vision_forward(self.towers["visual"], architecture.patches(inputs))[0]
            return architecture.audio_forward(self.towers["audio_tower"], inputs.float())[0]

    def hidden(self, embeds: torch.Tensor, positions: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        """Last hidden states [B, T, 576]; positions [3, T]."""
        positions = positions[:, None].expand(3, len(embeds), -1)
        return self.core.language_model(
            inputs_embeds=embeds, position_ids=positions, attention_mask=mask, use_cache=False
        ).last_hidden_state

    def answer_logits(self, packed: prompts.Packed, pictures: torch.Tensor, sounds: torch.Tensor) -> torch.Tensor:
        """Logits [answer tokens, vocabulary] in the order of ``packed.targets``."""
        embeds = self.core.language_model.embed_tokens(packed.ids)
        for kind, inputs, where in (("image", pictures, packed.image), ("audio", sounds, packed.audio)):
            if len(where):
                embeds = embeds.index_copy(1, where, self.features(kind, inputs).to(embeds.dtype))
        states = self.hidden(embeds, packed.positions, packed.mask.to(embeds.dtype))
        return self.model.lm_head(states[packed.targets >= 0]).float()

    def pass_scene(
        self, scene: str, data: Scenes, count: int, rng: np.random.Generator
    ) -> tuple[prompts.Packed, torch.Tensor]:
        """One drawn batch of a scene and its answer logits."""
        pictures, sounds = data.draw(scene, count, rng)
        asked = data.questions(scene, pictures, sounds, rng)
        packed = prompts.pack(self.core, self.tokenizer, C.SCENES[scene]["media"], asked)
        return packed, self.answer_logits(packed, data.vision["input"][pictures], data.audio["input"][sounds])

    def prose_loss(self, rng: np.random.Generator) -> torch.Tensor:
        """Divergence from the original language model on prose."""
        rows = torch.tensor(np.array(self.passages)[rng.integers(0, len(self.passages), C.PROSE_BATCH)])
        positions = torch.arange(rows.shape[1]).expand(3, -1)
        embeds = self.core.language_model.embed_tokens(rows)
        with torch.no_grad():
            Adapted.enabled = False
            wanted = self.model.lm_head(self.hidden(embeds, positions)).float().log_softmax(-1)
            Adapted.enabled = True
        found = self.model.lm_head(self.hidden(embeds, positions)).float().log_softmax(-1)
        return F.kl_div(found.flatten(0, 1), wanted.flatten(0, 1), log_target=True, reduction="batchmean")

    def loss(self, scene: str, data: Scenes, rng: np.random.Generator) -> torch.Tensor:
        """Loss of one step."""
        if scene == "prose":
            return self.prose_loss(rng)
        packed, logits = self.pass_scene(scene, data, C.SCENES[scene]["batch"], rng)
        wanted = packed.targets >= 0
        losses = torch.zeros(wanted.shape).masked_scatter(
            wanted, F.cross_entropy(logits, packed.targets[wanted], reduction="none")
        )
        # Every question counts alike, whether its answer is one token or twelve.
        means = [losses[:, a:b].sum() / wanted[:, a:b].sum() for a, b in packed.branches]
        return torch.stack(means).mean()

    @torch.no_grad()
    def score(self, data: Scenes, count: int = 40) -> str:
        """Share of exact answers by scene and task under teacher forcing: for whole answers that is greedy decoding."""
        shown = []
        for scene, plan in C.SCENES.items():
            packed, logits = self.pass_scene(scene, data, count, pools.stream("score", scene))
            wrong = torch.zeros_like(packed.targets, dtype=torch.bool)
            wanted = packed.targets >= 0
            wrong[wanted] = logits.argmax(-1) != packed.targets[wanted]
            for task, (first, last) in zip(plan["tasks"], packed.branches, strict=True):
                shown.append(f"{scene}.{task} {1 - wrong[:, first:last].any(1).float().mean():.2f}")
        return " ".join(shown)

    def rate(self, first: int, since: int) -> float:
        """Share of the peak rate: a rise after ``since`` or a resume, constant, then down over the last 45 percent."""
        left = (self.steps - self.step) / (self.steps - self.begin)
        peak = C.SECOND_RATE if self.begin else 1.0
        return peak * max(0.0, min(1.0, (self.step - max(first, since) + 1) / 15)) * min(1.0, max(0.04, left / 0.45))

    def run(self, data: Scenes, check: Scenes) -> None:
        """Train to the last step."""
        started, first = time.time(), self.step
        sums: dict[str, list[float]] = {}
        while self.step < self.steps:
            scene = C.ROUND[self.step % len(C.ROUND)]
            for group in self.optimizer.param_groups:
                group["lr"] = group["peak"] * self.rate(first, group["from"])
            loss = self.loss(scene, data, pools.stream("align", self.step))
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            for group in self.optimizer.param_groups:
                nn.utils.clip_grad_norm_(group["params"], 1.0)
            self.optimizer.step()
            self.step += 1
            sums.setdefault(scene, []).append(loss.item())
            if self.step % len(C.ROUND) == 0:
                shown = " ".join(f"{k} {np.mean(v):.3f}" for k, v in sorted(sums.items()))
                log.info("step %d of %d %s %.0f s", self.step, self.steps, shown, time.time() - started)
                sums = {}
                self.save()
            if self.step % (4 * len(C.ROUND)) == 0:
                log.info("step %d exact on calibration: %s", self.step, self.score(check))
        self.save()


def main() -> None:
    """Command line: the working folder, the number of steps, threads."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("/tmp/train"))
    parser.add_argument("--steps", type=int)
    parser.add_argument("--second", action="store_true", help="go on from the first alignment with polished towers")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    logs.start(options.work, "align_second" if options.second else "align")
    torch.set_num_threads(options.threads)
    data = Scenes("train", C.VISION_POOL, C.AUDIO_POOL, C.CLIPS)
    check = Scenes(
        "calibration", *(dict.fromkeys(p, C.CHECK) for p in (C.VISION_POOL, C.AUDIO_POOL)), dict.fromkeys(C.CLIPS, 3)
    )
    log.info("data ready")
    steps = options.steps or (C.SECOND_STEPS if options.second else C.ALIGN_STEPS)
    Alignment(options.work, steps, options.second).run(data, check)


if __name__ == "__main__":
    main()
