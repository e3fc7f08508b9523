"""lmms-eval sees masq's models whole: every medium arrives, every failure is seen, finished batches stay."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from lmms_eval.evaluator import simple_evaluate
from lmms_eval.tasks import TaskManager

from masq.errors import ConfigError, DataError, ModelError
from masq.evaluation.generation import read_answer
from masq.evaluation.local.multimodal_task import LocalTask
from masq.evaluation.multimodal import MasqLmms
from masq.models.base import Modality, ModelAdapter, Role, Sample
from masq.models.conversation import kind_of
from masq.models.qwen2_5_vl import Qwen25VLAdapter
from masq.models.zoo import nano
from masq.modules.modality import ModalityContext
from masq.modules.quant_linear import QuantLinear
from masq.numerics.affine import quantize
from masq.numerics.scheme import TensorFormat

Make = Callable[..., ModelAdapter]


def ask(model: MasqLmms, *tasks: LocalTask) -> dict[str, Any]:
    found = simple_evaluate(
        model=model,
        tasks=list(tasks),
        task_manager=TaskManager(include_defaults=False),
        bootstrap_iters=0,
        process_docs_parallel=1,
    )
    assert found is not None
    return found


def task(name: str, samples: list[Sample]) -> LocalTask:
    return LocalTask({"task": f"masq_{name}"}, [one for one in samples if one.task == name], max_new_tokens=4)


class Listener:
    """Answers the question itself, and notes what it was shown."""

    end_ids = (0,)

    def __init__(self) -> None:
        self.model = SimpleNamespace(device="cpu")
        self.shown: list[list[str]] = []
        self.calls = 0

    def encode_conversations(self, conversations: Any) -> Any:
        self.shown += [[kind_of(part) for part in one.parts] for one in conversations]
        return conversations

    def generate(self, conversations: Any, max_new_tokens: int, _max_seconds: float | None = None) -> list[list[int]]:
        self.calls += 1
        return [[*map(ord, one.texts[-1]), 0] for one in conversations]

    def decode(self, ids: Any) -> str:
        return "".join(map(chr, ids)).rstrip("\0")


def words(name: str, *texts: str, answer: str = "yes", **media: Any) -> list[Sample]:
    return [Sample(f"{name}-{index}", name, text, answer, **media) for index, text in enumerate(texts)]


def test_scores_are_those_counted_by_hand(tmp_path: Path) -> None:
    model: Any = Listener()
    lmms = MasqLmms(model, folder=tmp_path, batch_size=2)
    found = ask(
        lmms, task("read", words("read", "yes", "no", "Yes.")), task("speech", words("speech", "yes", "yes no"))
    )
    assert found["results"]["masq_read"]["exact_match,none"] == pytest.approx(2 / 3)
    assert found["results"]["masq_speech"]["exact_match,none"] == 0.5
    assert found["results"]["masq_speech"]["wer,none"] == 0.5, "one inserted word over two reference words"
    assert {name: len(logged) for name, logged in found["samples"].items()} == {"masq_read": 3, "masq_speech": 2}
    assert [answer.text for answer in lmms.answers["masq_speech"]] == ["yes", "yes no"]
    assert model.calls == 3
    assert lmms.decoding["masq_read"] == {"max_new_tokens": 4, "until": [], "ignored": {}}


def test_every_medium_of_a_request_arrives(samples: list[Sample], tmp_path: Path) -> None:
    """The fault of dropping the picture of a question about picture and sound would be seen here."""
    model: Any = Listener()
    ask(MasqLmms(model, folder=tmp_path, batch_size=8), task("same", samples))
    assert model.shown == [["image", "audio", "text"]] * 3


def test_answers_are_those_of_the_model(make_model: Make, samples: list[Sample], tmp_path: Path) -> None:
    adapter = make_model()
    lmms = MasqLmms(adapter, folder=tmp_path, batch_size=2)
    ask(lmms, *(task(name, samples) for name in ("digits", "speech", "same")))
    for name in ("digits", "speech", "same"):
        chosen = [one for one in samples if one.task == name]
        expected = []
        for part in (chosen[:2], chosen[2:]):
            ids = adapter.generate(adapter.encode(part, with_answer=False), 4)
            expected += [read_answer(adapter, "", own).text for own in ids]
        assert [answer.text for answer in lmms.answers[f"masq_{name}"]] == expected


def test_an_exception_is_not_an_empty_answer(tmp_path: Path) -> None:
    class Breaking(Listener):
        def generate(self, conversations: Any, max_new_tokens: int, *_limits: Any) -> list[list[int]]:
            if self.calls == 1:
                raise MemoryError("out of memory")
            return super().generate(conversations, max_new_tokens)

    model: Any = Breaking()
    with pytest.raises(MemoryError):
        ask(MasqLmms(model, folder=tmp_path, batch_size=1), task("read", words("read", "yes", "no", "yes")))
    assert [path.name for path in tmp_path.iterdir()] == ["masq_read-4-0000.json"], "the finished batch stays"
    again: Any = Listener()
    found = ask(MasqLmms(again, folder=tmp_path, batch_size=1), task("read", words("read", "yes", "no", "yes")))
    assert again.calls == 2
    assert found["results"]["masq_read"]["exact_match,none"] == pytest.approx(2 / 3)


def test_a_model_without_a_modality_map_does_not_answer(
    make_model: Make, samples: list[Sample], tmp_path: Path
) -> None:
    """Quantized linears whose hook is gone must not take every token for text."""
    adapter = make_model()
    block, context = adapter.blocks()[0], ModalityContext()
    linear: Any = block.linear(Role.UP)
    weights = {Modality.TEXT: quantize(linear.weight.detach(), TensorFormat(8))}
    activation = TensorFormat(8, granularity="per_token")
    block.set_linear(Role.UP, QuantLinear(weights=weights, bias=linear.bias, activation=activation, context=context))
    with pytest.raises(ModelError, match="must know the modality of every token"):
        ask(MasqLmms(adapter, folder=tmp_path), task("same", samples))
    assert not list(tmp_path.iterdir())


def test_other_questions_and_limits_never_get_old_answers(tmp_path: Path) -> None:
    first: Any = Listener()
    ask(MasqLmms(first, folder=tmp_path, batch_size=4), task("read", words("read", "yes", "no")))
    second: Any = Listener()
    found = ask(MasqLmms(second, folder=tmp_path, batch_size=4), task("read", words("read", "yes", "yes")))
    assert (second.calls, found["results"]["masq_read"]["exact_match,none"]) == (1, 1.0)
    longer = LocalTask({"task": "masq_read"}, words("read", "yes", "yes"), max_new_tokens=5)
    third: Any = Listener()
    ask(MasqLmms(third, folder=tmp_path, batch_size=4), longer)
    assert third.calls == 1


def test_a_task_twice_in_one_process_scores_the_same(tmp_path: Path) -> None:
    model: Any = Listener()
    scores = [
        ask(MasqLmms(model, folder=tmp_path / str(run)), task("read", words("read", "yes", "no")))["results"]
        for run in range(2)
    ]
    assert scores[0] == scores[1]


def test_sound_sent_as_video_is_heard(tmp_path: Path, make_model: Make) -> None:
    """lmms-eval calls a decoded sound without a type a video."""
    sound = {"array": np.sin(np.arange(4000) / 3).astype(np.float32), "sampling_rate": 16000}
    messages = [{"role": "user", "content": [{"type": "video", "url": sound}, {"type": "text", "text": "?"}]}]
    adapter = make_model()
    seen: list[Any] = []
    generate = adapter.generate

    def watch(batch: Any, *limits: Any) -> list[list[int]]:
        seen.append(batch.modality)
        return generate(batch, *limits)

    adapter.generate = watch  # type: ignore[method-assign]
    lmms = MasqLmms(adapter, folder=tmp_path)
    lmms.task_dict["heard"] = {"test": [None]}
    asked = ("ctx", lambda _doc: messages, {"max_new_tokens": 2, "until": ["\n"]}, 0, "heard", "test")
    request: Any = SimpleNamespace(args=asked)
    assert len(lmms.generate_until([request])) == 1
    assert int(Modality.AUDIO) in seen[0]
    assert int(Modality.VISION) not in seen[0]


def test_media_that_are_lost_or_not_taken_end_the_evaluation(samples: list[Sample], tmp_path: Path) -> None:
    vision_only = Qwen25VLAdapter(*nano.build("nano_vl"))
    with pytest.raises(ModelError, match="has audio"):
        ask(MasqLmms(vision_only, folder=tmp_path / "a"), task("speech", samples))
    model: Any = Listener()
    broken = words("read", "yes", image=b"no picture")
    with pytest.raises(DataError, match="complete PNG"):
        ask(MasqLmms(model, folder=tmp_path / "b"), task("read", broken))


def test_what_a_task_asks_for_and_does_not_get_is_noted(tmp_path: Path) -> None:
    model: Any = Listener()
    lmms = MasqLmms(model, folder=tmp_path, max_new_tokens=7)
    lmms.task_dict["t"] = {"test": ["doc"]}
    asked = {"until": "\n", "temperature": 0.7, "do_sample": False, "num_beams": 5, "top_p": None, "penalty": 2}
    messages = [{"role": "user", "content": "one\ntwo"}]
    request: Any = SimpleNamespace(args=("ctx", lambda _doc: messages, asked, 0, "t", "test"))
    assert lmms.generate_until([request]) == ["one"], "the stop text ends the answer"
    ignored = {"temperature": 0.7, "num_beams": 5, "penalty": 2}
    assert lmms.decoding["t"] == {"max_new_tokens": 7, "until": ["\n"], "ignored": ignored}


def test_what_is_not_offered_says_so(tmp_path: Path) -> None:
    model: Any = Listener()
    lmms = MasqLmms(model, folder=tmp_path)
    with pytest.raises(NotImplementedError, match="lm-eval"):
        lmms.loglikelihood([])
    with pytest.raises(NotImplementedError, match="several rounds"):
        lmms.generate_until_multi_round([])
    with pytest.raises(ConfigError, match="batch_size must be positive"):
        MasqLmms(model, batch_size=0)
    with pytest.raises(ConfigError, match="Run it in lm-eval"):
        LocalTask({"task": "masq_tale"}, [])


def test_the_tasks_have_names_in_the_harness() -> None:
    folder = Path(__file__).parents[2] / "masq" / "evaluation" / "local" / "multimodal"
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    names = ("ask", "digits", "larger", "read", "same", "speech", "sum", "table")
    assert manager.all_tasks == [f"masq_{name}" for name in names]
    loaded = manager.load_task_or_group("masq_speech", task_type="chat")["masq_speech"]
    assert len(loaded.test_docs()) == 400
    assert list(loaded.aggregation()) == ["exact_match", "wer"]
