"""Benchmarks as task objects of their harness, on data from the hub or from files.

Prompts, scores and aggregates are the harness' own, unmodified. Only the loading is masq's: sounds are decoded by
libsndfile, so that neither torchcodec nor FFmpeg is needed, and a failure to load says what failed.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from datasets import Audio, Dataset, DatasetDict, Image, load_dataset
from lmms_eval.api.task import ConfigurableMessagesTask
from lmms_eval.utils import load_yaml_config
from tenacity import RetryError

from masq.errors import DataError
from masq.evaluation.benchmark import MODULES, Benchmark
from masq.models.media import read_sound

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import torch

# What the tasks assume; lmms-eval calls a sound of WenetSpeech with another rate this one without resampling it if
# librosa is missing.
RATE = 16000


@dataclass(frozen=True, eq=False)
class Samples:
    """A decoded sound.

    Attributes:
        data: float32 [1, num_samples].
        sample_rate: samples a second.
    """

    data: torch.Tensor
    sample_rate: int


class Recording(dict[str, str]):
    """A sound that is decoded when it is asked for, as tasks and messages of lmms-eval take it.

    Messages keep a dictionary that says its type; the task of WenetSpeech asks for ``get_all_samples`` as torchcodec's
    decoders have it. Encoded bytes are no item of the dictionary: the harness would log them as a picture.
    """

    def __init__(self, source: Mapping[str, Any], name: str) -> None:
        """Keep ``source``, a dictionary with ``bytes`` or ``path``; ``name`` is for errors."""
        super().__init__(type="audio")
        self._source, self._name = dict(source), name

    def get_all_samples(self) -> Samples:
        """The waveform at ``RATE``, its channels averaged.

        Raises:
            DataError: not a sound file that libsndfile reads.
        """
        import torch

        sound = read_sound(self._source, self._name).at(RATE)
        return Samples(torch.from_numpy(sound.waveform).unsqueeze(0), RATE)


class BenchmarkTask(ConfigurableMessagesTask):
    """A task of lmms-eval whose records may come from a file."""

    def __init__(self, config: dict[str, Any], data: Path | None = None) -> None:
        """Make the task.

        Args:
            config: of the harness' YAML file, functions resolved.
            data: see ``make_task``.
        """
        self._data = data
        super().__init__(config=config)

    def download(self, *args: Any, **_kwargs: Any) -> None:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Load the records, and wrap their sounds; the only argument is the task's ``dataset_kwargs``.

        Raises:
            DataError: they cannot be loaded.
        """
        name, split = str(self.config.task), str(self.config.test_split)
        if self._data is not None:
            loaded = DatasetDict({split: read_records(self._data, name)})
        else:
            # Several files ask for a token of the hub where the data are open to all.
            kwargs = {key: value for key, value in (args[0] or {}).items() if key != "token"}
            try:
                super().download(kwargs)
            except RetryError as error:
                raise _not_loaded(name, error.last_attempt.exception()) from error
            loaded = self.dataset
        self.dataset = DatasetDict({key: _with_sounds(part, name) for key, part in loaded.items()})
        self.dataset_no_image = DatasetDict({key: _without_media(part) for key, part in loaded.items()})


def make_task(benchmark: Benchmark, data: Path | None = None) -> Any:
    """A new task object for ``simple_evaluate(tasks=[...])`` of the benchmark's harness.

    Args:
        benchmark: which.
        data: folder that holds ``<name>.parquet`` or ``<name>/*.parquet`` with the records of the evaluated split as
            they are on the hub; None for the hub itself.

    Raises:
        ConfigError: a package is missing.
        DataError: the records cannot be loaded.
    """
    benchmark.check()
    if benchmark.harness == "lmms-eval":
        path = task_manager(benchmark).task_index[benchmark.task]["yaml_path"]
        return BenchmarkTask(load_yaml_config(yaml_path=path, mode="full"), data)
    return _language_task(benchmark, data)


def task_manager(*benchmarks: Benchmark) -> Any:
    """The harness' index of the folders of ``benchmarks`` alone, all of one harness: the whole takes half a minute."""
    (harness,) = {one.harness for one in benchmarks}
    spec = find_spec(MODULES[harness])
    assert spec is not None and spec.origin is not None
    folders: list[Any] = [str(Path(spec.origin).parent / "tasks" / one.folder) for one in benchmarks]
    if harness == "lmms-eval":
        from lmms_eval.tasks import TaskManager

        return TaskManager(verbosity="WARNING", include_path=folders, include_defaults=False)
    from lm_eval.tasks import TaskManager as LanguageTaskManager

    return LanguageTaskManager(include_path=folders, include_defaults=False)


def _language_task(benchmark: Benchmark, data: Path | None) -> Any:
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.tasks._yaml_loader import load_yaml

    # A dictionary handed to lm-eval's index inherits nothing from the task that it names, so its file is read here.
    config = load_yaml(task_manager(benchmark).task_index[benchmark.task].yaml_path)
    config.pop("tag", None)
    if data is not None:
        records = DatasetDict({benchmark.split: read_records(data, benchmark.name)})
        # There is one split; lm-eval looks into those for training and few-shot examples, too, if they have names.
        config |= {"training_split": None, "validation_split": None, "test_split": benchmark.split}
        config["custom_dataset"] = lambda **_told: records
    try:
        return ConfigurableTask(config=config)
    except (OSError, ValueError) as error:
        raise _not_loaded(benchmark.name, error) from error


def read_records(data: Path, name: str) -> Dataset:
    """Records of one benchmark from Parquet files, memory-mapped; nothing is copied to a cache.

    Args:
        data: folder that holds ``<name>.parquet`` or ``<name>/*.parquet``.
        name: of the benchmark.

    Raises:
        DataError: no such file, or none that can be read.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    single = data / f"{name}.parquet"
    files = [single] if single.exists() else sorted((data / name).glob("*.parquet"))
    if not files:
        raise DataError(
            f"the records of {name} must be in {name}.parquet or {name}/*.parquet",
            value=f"neither is in {data}",
            remedy="put the Parquet files of the evaluated split there, or read from the hub",
        )
    try:
        return Dataset(pa.concat_tables([pq.read_table(file, memory_map=True) for file in files]))
    except (OSError, pa.ArrowException) as error:
        raise _not_loaded(name, error) from error


def read_rows(benchmark: Benchmark, data: Path | None = None) -> list[str]:
    """The texts behind a metric that masq computes beside the harness (``Benchmark.rows``).

    Args:
        benchmark: one that has rows.
        data: folder that holds ``<name>_rows.parquet`` or ``<name>_rows/*.parquet``; None for the hub.

    Raises:
        DataError: they cannot be loaded.
    """
    rows = benchmark.rows
    assert rows is not None, benchmark.name
    if data is not None:
        return list(read_records(data, f"{benchmark.name}_rows")[rows.column])
    try:
        return list(load_dataset(rows.path, rows.name, split=rows.split)[rows.column])
    except (OSError, ValueError) as error:
        raise _not_loaded(benchmark.name, error) from error


def _not_loaded(name: str, error: BaseException | None) -> DataError:
    return DataError(
        f"the data of {name} must be there before it is evaluated",
        value=f"{type(error).__name__}: {error}".splitlines()[0],
        remedy="fetch them on a machine with access to the hub, or put Parquet files into a folder of your own",
    )


def _with_sounds(records: Dataset, name: str) -> Dataset:
    columns = [key for key, feature in records.features.items() if isinstance(feature, Audio)]
    for key in columns:
        records = records.cast_column(key, Audio(decode=False))
    return records.with_transform(partial(_wrap, columns, name)) if columns else records


def _wrap(columns: Sequence[str], name: str, batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
    return batch | {key: [Recording(one, name) for one in batch[key]] for key in columns}


def _without_media(records: Dataset) -> Dataset:
    return records.remove_columns(
        [key for key, feature in records.features.items() if isinstance(feature, Audio | Image)]
    )
