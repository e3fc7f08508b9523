"""Dense warm-up of one tower: every token is classified against the language model's own embeddings."""

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

from . import architecture, logs, pools
from . import constants as C

log = logging.getLogger(__name__)


def class_embeddings() -> torch.Tensor:
    """Frozen language-model embeddings of the answer vocabulary [classes, 576]."""
    import gguf

    reader = gguf.GGUFReader(architecture.language_model_file())
    tensor = next(t for t in reader.tensors if t.name == "token_embd.weight")
    tok = architecture.tokenizer()
    ids = [tok(name, add_special_tokens=False).input_ids for name in pools.CLASSES]
    assert all(len(i) == 1 for i in ids), "every class must be one token"
    rows = gguf.quants.dequantize(tensor.data[[i[0] for i in ids]], tensor.tensor_type)
    return torch.from_numpy(np.ascontiguousarray(rows)).float()


def dense_loss(hidden: torch.Tensor, labels: torch.Tensor, table: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosine classification against the table plus regression onto the label's embedding."""
    cosine = F.normalize(hidden, dim=-1) @ F.normalize(table, dim=-1).T
    loss = F.cross_entropy(C.TEMPERATURE * cosine.flatten(0, 1), labels.flatten())
    target = table[labels]
    distance = (hidden - target).pow(2).mean() / table.pow(2).mean()
    return loss + C.REGRESSION * distance, cosine.argmax(-1)


def practice(step: int) -> dict[str, float]:
    """Shares of a batch of pictures that are drawn from single kinds at ``step``; the rest is drawn from all."""
    return next(shares for first, shares in reversed(C.PRACTICE.items()) if step >= first)


def _part(state: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}


class Warmup:
    """One tower, its auxiliary head, its pools and its optimiser."""

    def __init__(self, name: str, folder: Path, steps: int, polish: bool = False) -> None:
        """Build or resume; to ``polish`` is to go on with the towers of the first alignment."""
        self.name, self.steps, self.polish = name, steps, polish
        self.file = folder / f"{'polish' if polish else 'warm'}_{name}.safetensors"
        self.peak = (C.POLISH_RATE if polish else C.WARM_RATE)[name]
        made = architecture.towers((name,))
        self.tower = next(iter(made.values()))
        classes = len(pools.LETTERS) if name == "vision" else len(pools.CLASSES)
        self.head = nn.Linear(C.WIDTH_TOWER, classes)
        self.modules = nn.ModuleDict({"tower": self.tower, "head": self.head})
        self.table = class_embeddings()
        self.optimizer = torch.optim.AdamW(self.modules.parameters(), lr=self.peak, weight_decay=0.02, fused=True)
        self.step = 0
        if polish and not self.file.exists():
            self.head.load_state_dict(_part(load_file(folder / f"warm_{name}.safetensors"), "head."))
            target = {"vision": "towers.visual.", "audio": "towers.audio_tower."}[name]
            self.tower.load_state_dict(_part(load_file(folder / "align.safetensors"), target))
        if self.file.exists():
            state = load_file(self.file)
            self.step = int(state.pop("step"))
            self.modules.load_state_dict(state)
            log.info("%s: resumed at step %d", name, self.step)

    def load_pools(self) -> None:
        """Synthesise the training and calibration pools."""
        started = time.time()
        if self.name == "vision":
            sizes = dict.fromkeys(C.VISION_POOL, 80)
            train = pools.vision_samples("train", C.VISION_POOL)
            check, held = (pools.vision_samples(split, sizes) for split in ("calibration", "evaluation"))
            self.make = pools.vision_tensors
        else:
            sizes, clips = dict.fromkeys(C.AUDIO_POOL, 116), dict.fromkeys(C.CLIPS, 4)
            train = pools.audio_samples("train", C.AUDIO_POOL, C.CLIPS)
            check, held = (pools.audio_samples(split, sizes, clips) for split in ("calibration", "evaluation"))
            self.make = pools.audio_tensors
        self.kinds = len(sizes)
        self.train, self.check, self.held = self.make(train), self.make(check), self.make(held)
        log.info("%s: pools of %d ready in %.0f s", self.name, len(train), time.time() - started)

    def forward(self, batch: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Projected tokens and the auxiliary head's logits."""
        if self.name == "vision":
            hidden, states = architecture.vision_forward(self.tower, architecture.patches(batch))
        else:
            hidden, states = architecture.audio_forward(self.tower, batch.float())
        return hidden, self.head(states)

    def loss(self, data: dict[str, torch.Tensor], rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Total loss and the predicted class of every token."""
        with torch.autocast("cpu", torch.bfloat16, architecture.compute_dtype() == torch.bfloat16):
            hidden, aux = self.forward(data["input"][rows])
        labels = data["aux"][rows]
        side = F.cross_entropy(aux.float().flatten(0, 1), labels.flatten())
        main, found = dense_loss(hidden.float(), data["final"][rows], self.table)
        self.side = (aux.argmax(-1) == labels).float().mean().item()
        return main + side, found

    @torch.no_grad()
    def score(self, data: dict[str, torch.Tensor]) -> str:
        """Share of samples with every token right, kind by kind; a word counts if most of its tokens name it."""
        found = torch.cat([self.loss(data, rows)[1] for rows in torch.arange(len(data["input"])).split(100)])
        exact = (found == data["final"]).all(1)
        digits = len(C.DIGITS) + len(C.PLATE_LETTERS)
        word = data["final"].amax(1)
        votes = torch.where(found > digits, found, -1)
        votes[:, 0] = torch.where(votes.amax(1) < 0, 0, votes[:, 0])
        named = torch.stack([v[v >= 0].mode().values for v in votes])
        exact = torch.where(word > digits, named == word, exact).float()
        return " ".join(f"{part.mean():.2f}" for part in exact.chunk(self.kinds))

    def save(self) -> None:
        """Write weights and step atomically."""
        state = {k: v.contiguous() for k, v in self.modules.state_dict().items()}
        part = self.file.with_suffix(".part")
        save_file({**state, "step": torch.tensor(self.step)}, part)
        part.replace(self.file)

    def rows(self) -> torch.Tensor:
        """The batch of this step: epoch by epoch, some of it replaced by kinds that need more practice."""
        size, width = len(self.train["input"]), C.WARM_BATCH[self.name]
        order = torch.from_numpy(pools.stream("warm", self.name, self.step // (size // width)).permutation(size))
        at = self.step % (size // width) * width
        rows, filled = order[at : at + width].clone(), 0
        if self.name == "vision":
            rng, edges = pools.stream("practice", self.step), np.cumsum([0, *C.VISION_POOL.values()])
            for kind, share in practice(self.step if not self.polish else max(C.PRACTICE)).items():
                number, count = list(C.VISION_POOL).index(kind), round(share * width)
                rows[filled : filled + count] = torch.from_numpy(rng.integers(*edges[number : number + 2], count))
                filled += count
        return rows

    def run(self) -> None:
        """Train to the last step with a warm start and cosine decay."""
        started, first = time.time(), self.step
        while self.step < self.steps:
            rows = self.rows()
            # The schedule follows the step alone; only the rise is repeated after a resume, for the new moments.
            decay = 0.5 * (1 + math.cos(math.pi * self.step / self.steps))
            rate = self.peak * min(1.0, (self.step - first + 1) / 50) * decay
            for group in self.optimizer.param_groups:
                group["lr"] = rate + 1e-5
            loss, found = self.loss(self.train, rows)
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(self.modules.parameters(), 1.0)
            self.optimizer.step()
            self.step += 1
            if self.step % 100 == 0:
                right = (found == self.train["final"][rows]).float().mean().item()
                log.info(
                    "%s step %d of %d loss %.3f tokens %.3f aux %.3f %.0f s",
                    self.name,
                    self.step,
                    self.steps,
                    loss.item(),
                    right,
                    self.side,
                    time.time() - started,
                )
            if self.step % 100 == 0:
                self.save()
                log.info(
                    "%s step %d exact: calibration %s, evaluation %s",
                    self.name,
                    self.step,
                    self.score(self.check),
                    self.score(self.held),
                )
        self.save()


def main() -> None:
    """Command line: the tower, the working folder, the number of steps."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("tower", choices=["vision", "audio"])
    parser.add_argument("--work", type=Path, default=Path("/tmp/train"))
    parser.add_argument("--steps", type=int)
    parser.add_argument("--polish", action="store_true", help="go on with the towers of the first alignment")
    options = parser.parse_args()
    logs.start(options.work, f"polish_{options.tower}" if options.polish else options.tower)
    torch.set_num_threads(1)
    steps = options.steps or (C.POLISH_STEPS if options.polish else C.WARM_STEPS)[options.tower]
    job = Warmup(options.tower, options.work, steps, options.polish)
    job.load_pools()
    job.run()


if __name__ == "__main__":
    main()
