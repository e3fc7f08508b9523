"""Float scores of the shipped model: greedy generation with the key-value cache over the evaluation split."""

from __future__ import annotations

import argparse
import io
import logging
import time

import jiwer
import numpy as np
import pyarrow.parquet as pq
import soundfile
import torch
from PIL import Image

from masq.models.zoo import smol_omni

from . import constants as C

log = logging.getLogger(__name__)
BATCH = 20


def media_batch(processor, rows: list[dict]) -> dict[str, torch.Tensor]:
    """Prompts of rows of one task, left-padded."""
    texts, images, audio = [], [], []
    for row in rows:
        content = []
        if row["image"] is not None:
            content.append({"type": "image"})
            images.append(Image.open(io.BytesIO(row["image"])).convert("RGB"))
        if row["audio"] is not None:
            content.append({"type": "audio"})
            audio.append(soundfile.read(io.BytesIO(row["audio"]), dtype="float32")[0])
        content.append({"type": "text", "text": row["question"]})
        message = [{"role": "user", "content": content}]
        texts.append(processor.apply_chat_template(message, tokenize=False, add_generation_prompt=True))
    media = {"images": images or None, "audio": audio or None}
    return processor(text=texts, padding=True, return_tensors="pt", **{k: v for k, v in media.items() if v})


@torch.no_grad()
def answers(model, processor, rows: list[dict]) -> list[str]:
    """Greedy answers in the order of the rows."""
    found = []
    for start in range(0, len(rows), BATCH):
        inputs = media_batch(processor, rows[start : start + BATCH])
        output = model.generate(**inputs, max_new_tokens=6, do_sample=False)
        fresh = output[:, inputs["input_ids"].shape[1] :]
        found += [t.strip() for t in processor.tokenizer.batch_decode(fresh, skip_special_tokens=True)]
    return found


@torch.no_grad()
def perplexity(model, tokenizer, texts: list[str]) -> float:
    """Perplexity over passages, the first token of each not counted."""
    losses = []
    for text in texts:
        ids = torch.tensor([tokenizer(text, add_special_tokens=False).input_ids])
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0, :-1]
        losses.append(torch.nn.functional.cross_entropy(logits.float(), ids[0, 1:], reduction="none"))
    return float(torch.cat(losses).mean().exp())


def evaluate(model, processor, limit: int) -> dict[str, tuple[int, float]]:
    """Count and score per task: exact match, for prose perplexity; word error rate of speech beside."""
    rows = pq.read_table(smol_omni.data_path("evaluation")).to_pylist()
    scores: dict[str, tuple[int, float]] = {}
    for task in C.QUESTIONS:
        part = [r for r in rows if r["task"] == task][:limit]
        started, found = time.time(), answers(model, processor, part)
        truth = [r["answer"] for r in part]
        scores[task] = (len(part), float(np.mean([a == b for a, b in zip(found, truth, strict=True)])))
        if task == "speech":
            spaced = (
                [" ".join(t) if t.isdigit() else t for t in truth],
                [" ".join(f) if f.isdigit() else f for f in found],
            )
            scores["speech word error rate"] = (len(part), float(jiwer.wer(*spaced)))
        wrong = [f"{b}>{a}" for a, b in zip(found, truth, strict=True) if a != b]
        log.info("%s %s %.0f s; truth>answer: %s", task, scores[task], time.time() - started, " ".join(wrong[:15]))
    passages = [r["answer"] for r in rows if r["task"] == "prose"][:limit]
    scores["prose perplexity"] = (len(passages), perplexity(model, processor.tokenizer, passages))
    return scores


def main() -> None:
    """Command line: how many samples per task; ``--original`` also scores prose with the unadapted model."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--limit", type=int, default=10_000)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--original", action="store_true")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", force=True)
    torch.set_num_threads(options.threads)
    processor, model = smol_omni.build_processor(), smol_omni.build_model()
    scores = evaluate(model, processor, options.limit)
    if options.original:
        model.load_state_dict(smol_omni.language_state(smol_omni.language_file()), strict=False)
        rows = pq.read_table(smol_omni.data_path("evaluation")).to_pylist()
        passages = [r["answer"] for r in rows if r["task"] == "prose"][: options.limit]
        scores["prose perplexity, original"] = (len(passages), perplexity(model, processor.tokenizer, passages))
    print("| task | n | score |\n|---|---|---|")
    for task, (count, score) in scores.items():
        print(f"| {task} | {count} | {score:.3f} |")


if __name__ == "__main__":
    main()
