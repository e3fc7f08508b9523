"""End-to-end alignment: answer-only cross entropy through the frozen language model and a low-rank adapter."""
# ruff: noqa: SIM905

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

from . import architecture, pools, prompts, prose, warmup
from . import constants as C

log = logging.getLogger(__name__)
TASKS = {
    "oracle": "joint read joint speech joint prose joint digits joint read joint prose".split(),
    "towers": "read joint read speech read prose digits read joint read speech read".split(),
}


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


def compute_dtype() -> torch.dtype:
    """bfloat16 where the processor multiplies it natively; elsewhere it is emulated at a third of float32's speed."""
    return torch.bfloat16 if torch.cpu._is_amx_tile_supported() else torch.float32


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
        for short, name in (("q", "q_proj"), ("k", "k_proj"), ("v", "v_proj"), ("o", "o_proj")):
            adapted = Adapted(getattr(layer.self_attn, name))
            setattr(layer.self_attn, name, adapted)
            adapters[f"{index}_{short}"] = adapted
    return model, adapters, towers


class Data:
    """Pools of one split, with rows grouped by task and by word."""

    def __init__(self, split: str, vision: dict[str, int], audio: dict[str, int], clips: int) -> None:
        pictures = pools.vision_samples(split, vision)
        sounds = pools.audio_samples(split, audio, clips)
        self.vision, self.audio = pools.vision_tensors(pictures), pools.audio_tensors(sounds)
        self.picture_answers = [s["answer"] for s in pictures]
        self.sound_answers = [s["answer"] for s in sounds]
        kinds = np.array([s["kind"] for s in pictures])
        self.digits = np.flatnonzero(kinds == "digits")
        self.words, self.numbers = np.flatnonzero(kinds == "words"), np.flatnonzero(kinds == "numbers")
        self.spoken_words = np.flatnonzero(np.array([s["kind"] for s in sounds]) == "words")
        spoken = set(C.SPOKEN_WORDS)
        self.joint = np.array([i for i in self.words if self.picture_answers[i] in spoken])
        self.by_word = {w: [i for i in self.joint if self.picture_answers[i] == w] for w in C.SPOKEN_WORDS}

    def draw(self, task: str, count: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, list[str]]:
        """Rows of pictures, rows of sounds, answers."""
        if task == "speech":
            rows = rng.integers(0, len(self.sound_answers), count)
            return rows, rows, [self.sound_answers[r] for r in rows]
        if task == "joint":
            sounds = rng.choice(self.spoken_words, count)
            pictures, answers = [], []
            for index, row in enumerate(sounds):
                same = self.by_word[self.sound_answers[row]]
                pick = rng.choice(same) if index % 2 == 0 else rng.choice(self.joint)
                pictures.append(pick)
                answers.append("yes" if self.picture_answers[pick] == self.sound_answers[row] else "no")
            return np.array(pictures), sounds, answers
        if task == "digits":
            rows = rng.choice(self.digits, count)
        else:
            rows = np.where(rng.random(count) < 0.5, rng.choice(self.words, count), rng.choice(self.numbers, count))
        return rows, rows, [self.picture_answers[r] for r in rows]


class Alignment:
    """Model, adapters, towers, data and the two optimiser groups."""

    def __init__(self, folder: Path, options: argparse.Namespace) -> None:
        self.folder, self.options, self.step = folder, options, 0
        self.dtype = compute_dtype()
        self.model, self.adapters, self.towers = build(self.dtype)
        self.core = self.model.model
        self.tokenizer = smol_omni.build_tokenizer(smol_omni.language_file())
        self.table = warmup.class_embeddings()
        self.parameters = {n: p for n, p in self.adapters.named_parameters() if "linear" not in n}
        self.resume()
        groups = [{"params": list(self.parameters.values()), "peak": C.RATE_ADAPTER, "weight_decay": 0.0}]
        if not (options.oracle or options.frozen):
            groups.append({"params": list(self.towers.parameters()), "peak": C.RATE_TOWER, "weight_decay": 0.0})
        self.optimizer = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.98), fused=True)
        self.prompts: dict[tuple[str, str], prompts.Prompt] = {}
        for task, questions in C.QUESTIONS.items():
            for question in questions:
                self.prompts[task, question] = self.prompt(task, question)
        self.passages = prose.passages("train", self.tokenizer)

    def prompt(self, task: str, question: str) -> prompts.Prompt:
        tokens = C.ORACLE_AUDIO_TOKENS if self.options.oracle == "both" else C.AUDIO_TOKENS
        return prompts.build_prompt(self.core, self.tokenizer, task, question, tokens)

    def resume(self) -> None:
        """Towers from the warm-up, or everything from the last alignment checkpoint."""
        for name, target in (("vision", "visual"), ("audio", "audio_tower")):
            file = self.folder / f"warm_{name}.safetensors"
            if file.exists():
                state = load_file(file)
                self.towers[target].load_state_dict(
                    {k.removeprefix("tower."): v for k, v in state.items() if k.startswith("tower.")}
                )
        file = self.folder / "align.safetensors"
        if not file.exists():
            return
        state = load_file(file)
        self.step = int(state.pop("step"))
        trained = bool(state.pop("towers"))
        self.adapters.load_state_dict({k[9:]: v for k, v in state.items() if k.startswith("adapters.")}, strict=False)
        if trained:
            self.towers.load_state_dict({k[7:]: v for k, v in state.items() if k.startswith("towers.")})
        log.info("resumed at step %d, trained towers: %s", self.step, trained)

    def save(self) -> None:
        state = {f"adapters.{n}": p.detach().contiguous() for n, p in self.parameters.items()}
        state |= {f"towers.{n}": p.detach().contiguous() for n, p in self.towers.state_dict().items()}
        state |= {
            "step": torch.tensor(self.step),
            "towers": torch.tensor(int(not (self.options.oracle or self.options.frozen))),
        }
        part = self.folder / "align.part"
        save_file(state, part)
        part.replace(self.folder / "align.safetensors")

    def features(self, kind: str, data: Data, rows: np.ndarray) -> torch.Tensor:
        """Projected tokens; with ``--oracle`` the labels' embeddings plus noise stand in for the towers."""
        tensors = data.vision if kind == "image" else data.audio
        index = torch.from_numpy(rows)
        if self.options.oracle == "both" or (self.options.oracle == "vision" and kind == "image"):
            clean = self.table[tensors["final"][index]]
            clean = clean if kind == "image" else clean[:, : C.ORACLE_AUDIO_TOKENS]
            shrink = 0.4 + 0.6 * torch.rand(len(clean), 1, 1)
            return shrink * clean + 0.4 * clean.std() * torch.randn_like(clean)
        learning = torch.is_grad_enabled() and not self.options.frozen
        with torch.set_grad_enabled(learning), torch.autocast("cpu", torch.bfloat16, self.dtype == torch.bfloat16):
            if kind == "image":
                return architecture.vision_forward(
                    self.towers["visual"], architecture.patches(tensors["input"][index])
                )[0]
            return architecture.audio_forward(self.towers["audio_tower"], tensors["input"][index].float())[0]

    def hidden(self, embeds: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        positions = positions[:, None].expand(3, len(embeds), -1)
        return self.core.language_model(inputs_embeds=embeds, position_ids=positions, use_cache=False).last_hidden_state

    def answer_logits(self, task: str, question: str, data: Data, drawn: tuple) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits at the answer positions and their targets."""
        pictures, sounds, answers = drawn
        prompt = self.prompts[task, question]
        targets = prompts.answer_targets(self.tokenizer, task, answers)
        ids = prompt.ids.repeat(len(answers), 1)
        ids[:, prompt.start :] = targets[:, :-1].clamp(min=self.tokenizer.eos_token_id)
        embeds = self.core.language_model.embed_tokens(ids)
        for kind, rows, where in (("image", pictures, prompt.image), ("audio", sounds, prompt.audio)):
            if len(where):
                embeds = embeds.index_copy(1, where, self.features(kind, data, rows).to(embeds.dtype))
        states = self.hidden(embeds, prompt.positions)[:, prompt.start - 1 :]
        return self.model.lm_head(states).float(), targets

    def prose_loss(self, rng: np.random.Generator) -> torch.Tensor:
        """Divergence from the original language model on prose."""
        rows = torch.tensor(np.array(self.passages)[rng.integers(0, len(self.passages), 4)])
        positions = torch.arange(rows.shape[1]).expand(3, -1)
        embeds = self.core.language_model.embed_tokens(rows)
        with torch.no_grad():
            Adapted.enabled = False
            wanted = self.model.lm_head(self.hidden(embeds, positions)).float().log_softmax(-1)
            Adapted.enabled = True
        found = self.model.lm_head(self.hidden(embeds, positions)).float().log_softmax(-1)
        return F.kl_div(found.flatten(0, 1), wanted.flatten(0, 1), log_target=True, reduction="batchmean")

    def loss(self, task: str, data: Data, rng: np.random.Generator) -> torch.Tensor:
        if task == "prose":
            return self.prose_loss(rng)
        question = str(rng.choice(C.QUESTIONS[task]))
        drawn = data.draw(task, self.options.batch, rng)
        logits, targets = self.answer_logits(task, question, data, drawn)
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())

    @torch.no_grad()
    def score(self, data: Data, count: int = 24) -> dict[str, float]:
        """Share of exact answers under teacher forcing, which for exact answers equals greedy decoding."""
        result = {}
        for task, questions in C.QUESTIONS.items():
            for question in questions if task == "joint" else questions[:1]:
                drawn = data.draw(task, count, pools.stream("score", task))
                logits, targets = self.answer_logits(task, question, data, drawn)
                right = (logits.argmax(-1) == targets) | (targets == -100)
                result[f"{task} {question[:24]}"] = round(right.all(1).float().mean().item(), 2)
        return result

    def run(self, data: Data, check: Data) -> None:
        started, options, first = time.time(), self.options, self.step
        tasks = TASKS["oracle" if options.oracle else "towers"]
        sums: dict[str, list[float]] = {}
        while self.step < options.steps:
            task = tasks[self.step % len(tasks)]
            # Constant after a short rise, then down to a tenth over the last third.
            left = (options.steps - self.step) / (options.steps - first)
            scale = min(1.0, (self.step - first + 1) / 10) * min(1.0, max(0.1, left * 3))
            for group in self.optimizer.param_groups:
                group["lr"] = group["peak"] * scale
            loss = self.loss(task, data, pools.stream("align", self.step))
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_([p for g in self.optimizer.param_groups for p in g["params"]], 1.0)
            self.optimizer.step()
            self.step += 1
            sums.setdefault(task, []).append(loss.item())
            if self.step % len(tasks) == 0:
                shown = " ".join(f"{k} {np.mean(v):.3f}" for k, v in sorted(sums.items()))
                log.info("step %d of %d %s %.0f s", self.step, options.steps, shown, time.time() - started)
                sums = {}
                self.save()
            if self.step % (3 * len(tasks)) == 0:
                log.info("step %d exact on calibration: %s", self.step, self.score(check))
        self.save()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("/tmp/train"))
    parser.add_argument("--steps", type=int, default=C.ALIGN_STEPS)
    parser.add_argument("--batch", type=int, default=C.ALIGN_BATCH)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--oracle", choices=["both", "vision"], help="stand-in features, while towers still warm up")
    parser.add_argument("--frozen", action="store_true", help="keep the towers as the warm-up left them")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", force=True)
    logging.getLogger("httpx").setLevel(logging.WARNING)
    torch.set_num_threads(options.threads)
    job = Alignment(options.work, options)
    shares = {"vision": 0.15 if options.oracle else 1.0, "audio": 0.15 if options.oracle == "both" else 0.5}
    data = Data(
        "train",
        {k: int(v * shares["vision"]) for k, v in C.VISION_POOL.items()},
        {k: int(v * shares["audio"]) for k, v in C.AUDIO_POOL.items()},
        6 if options.oracle == "both" else C.CLIPS,
    )
    check = Data("calibration", {"words": 165, "numbers": 60, "digits": 60}, {"words": 116, "digits": 60}, 2)
    log.info("data ready")
    job.run(data, check)


if __name__ == "__main__":
    main()
