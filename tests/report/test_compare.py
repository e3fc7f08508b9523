from __future__ import annotations

import csv
import io
import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from masq import cli
from masq.errors import ConfigError, DataError
from masq.evaluation.outcomes import Outcomes, digests, hash_samples
from masq.evaluation.statistics import paired, standard_error, value
from masq.report.compare import compare, rows
from masq.report.record import RunRecord, read_record, write_record

BEFORE, AFTER = "1" * 90 + "0" * 10, "1" * 60 + "0" * 30 + "1" * 4 + "0" * 6
TOKENS = np.arange(20, 120)
NLL = TOKENS * np.random.default_rng(0).normal(3, 0.5, 100)
WORDS = np.tile([2, 3, 4, 5], 25)
ERRORS = np.tile([0, 0, 1, 0, 2], 20)


def ids(n: int = 100) -> str:
    return hash_samples(map(str, range(n)))


def hits(right: str, **fields: Any) -> Outcomes:
    return Outcomes("exact_match", True, ids(len(right)), tuple(map(float, right)), **fields)


def wer(errors: Any) -> Outcomes:
    return Outcomes("wer", False, ids(), tuple(errors), tuple(WORDS))


def perplexity(nll: Any) -> Outcomes:
    return Outcomes("perplexity", False, ids(), tuple(nll), tuple(TOKENS), "exp")


def make_record(method: str, found: dict[str, list[Outcomes]], *, data: str = "d" * 64, **config: Any) -> RunRecord:
    record = RunRecord.start(
        f"{method}-identity",
        {
            "model": {"name": "smol_omni", "source": "zoo:smol_omni"},
            "modality": {"name": "tri"},
            "method": {"name": method, "rounding": {"kind": "none" if method == "none" else "nearest"}},
            "scheme": {"name": "w4a6"},
            "calibration": {"samples_per_task": 12, "seed": 0},
            **config,
        },
        {"data": {"evaluation": data}},
    )
    for task, metrics in found.items():
        for outcomes in metrics:
            score = {"value": value(outcomes), "n": outcomes.n, "standard_error": standard_error(outcomes)}
            score |= {"higher_is_better": outcomes.higher_is_better, "valid": True}
            record.scores.setdefault(task, {})[outcomes.metric] = score  # type: ignore[assignment]
            record.outcomes.setdefault(task, {})[outcomes.metric] = outcomes.to_dict()
    record.finish()
    return record


def base() -> RunRecord:
    return make_record("none", {"read": [hits(BEFORE)], "speech": [wer(ERRORS)], "tale": [perplexity(NLL)]})


def other(method: str = "rtn", **config: Any) -> RunRecord:
    found = {"read": [hits(AFTER)], "speech": [wer(ERRORS)], "tale": [perplexity(NLL + 0.2 * TOKENS)]}
    return make_record(method, found, **config)


def cells(text: str) -> list[dict[str, str]]:
    lines = [line.strip("|").split("|") for line in text.splitlines() if line.startswith("|")]
    header, _, *body = [[cell.strip() for cell in line] for line in lines]
    return [dict(zip(header, line, strict=True)) for line in body]


def test_every_cell_by_hand() -> None:
    read, speech, tale = cells(compare([base(), other()]))
    # 30 lost and 4 gained of 100: (5 - 31) / 102 -+ 1.96 sqrt((36 / 102 - (26 / 102)^2) / 102); exact McNemar.
    assert read == {
        "task": "read",
        "metric": "exact match ↑",
        "scheme": "w4a6",
        "method": "rtn",
        "n": "100",
        "base": "0.900 ± 0.030",
        "compared": "0.640 ± 0.048",
        "difference [95 %]": "-0.260 [-0.359, -0.151]",
        "p": "6.2e-06",
        "p (Holm)": "1.8e-05",
        "lost": "30",
        "gained": "4",
        "changed": "-",
    }
    half = 1.959964 * math.sqrt((36 / 102 - (26 / 102) ** 2) / 102)
    assert f"{-26 / 102 - half:+.3f}, {-26 / 102 + half:+.3f}" == "-0.359, -0.151"
    p = 2 * sum(math.comb(34, k) for k in range(5)) / 2**34
    assert f"{p:.1e} {3 * p:.1e}" == "6.2e-06 1.8e-05", "the smallest of three p-values"
    assert (speech["metric"], speech["p"], speech["p (Holm)"]) == ("wer ↓", "1.000", "1.000 n.s.")
    assert (speech["lost"], speech["gained"], speech["changed"]) == ("-", "-", "-")
    assert speech["difference [95 %]"].startswith("+0.000 [")
    ppl = paired(perplexity(NLL), perplexity(NLL + 0.2 * TOKENS))
    assert ppl.interval is not None
    assert tale["difference [95 %]"] == "{:+.2f} [{:+.2f}, {:+.2f}]".format(ppl.difference, *ppl.interval)
    assert tale["base"] == f"{value(perplexity(NLL)):.2f} ± {standard_error(perplexity(NLL)):.2f}"
    assert (tale["p"], tale["p (Holm)"]) == ("5.0e-05", "1.0e-04")


def test_only_what_is_not_significant_is_marked() -> None:
    """Two tests: 0.03 alone would be significant, twice 0.03 is not."""
    weak = ("1" * 90 + "0" * 10, "1" * 80 + "0" * 10 + "1" * 2 + "0" * 8)
    one = [make_record(name, {"read": [hits(right)]}) for name, right in zip(("none", "rtn"), weak, strict=True)]
    assert rows(one)[0].is_significant and "n.s." not in compare(one).splitlines()[2]
    three = [*one, make_record("gptq", {"read": [hits(weak[1])]})]
    assert [row.adjusted for row in rows(three)] == [2 * rows(one)[0].adjusted] * 2
    assert not any(row.is_significant for row in rows(three))
    assert compare(three).count(" n.s. ") == 2
    assert "adjusted over the 2 comparisons shown" in compare(three)


def test_the_first_record_is_the_base_of_all_others() -> None:
    found = cells(compare([base(), other(), other("gptq")]))
    assert [(row["task"], row["method"]) for row in found] == [
        (task, method) for task in ("read", "speech", "tale") for method in ("rtn", "gptq")
    ]
    turned = cells(compare([other(), base()]))[0]
    assert turned["difference [95 %]"] == "+0.260 [+0.151, +0.359]"
    assert (turned["lost"], turned["gained"], turned["scheme"], turned["method"]) == ("4", "30", "float", "none")


def test_what_tells_records_apart_is_shown() -> None:
    seeds = [other("gptq", calibration={"samples_per_task": 12, "seed": seed}) for seed in (0, 1)]
    text = compare([base(), *seeds])
    assert [row["seed"] for row in cells(text)[:2]] == ["0", "1"]
    assert "- base is float;" in text
    assert "- base is gptq at w4a6, seed 0;" in compare(seeds)
    assert "- base is rtn at w4a6 (record 1);" in compare([other(), other()])


def test_changed_answers() -> None:
    first = make_record("none", {"read": [hits("1100", answers=digests(["a", "b", "c", "d"]))]})
    second = make_record("rtn", {"read": [hits("1100", answers=digests(["a", "b", "c", "e"]))]})
    assert [cells(compare([first, second]))[0][key] for key in ("lost", "gained", "changed")] == ["0", "0", "1"]


def test_scores_that_are_not_valid_say_so() -> None:
    record = other()
    record.scores["read"]["exact_match"]["valid"] = False  # type: ignore[typeddict-unknown-key]
    text = compare([base(), record])
    assert cells(text)[0]["compared"] == "0.640 ± 0.048 (!)"
    assert cells(text)[0]["base"] == "0.900 ± 0.030"
    assert "(!): too many answers failed" in text


def test_notes_say_how_to_read_and_what_a_table_says() -> None:
    record = other()
    record.warnings = ["block 3 fell back to nearest"]
    text = compare([base(), record])
    assert "- base is float; difference is compared - base on the same samples, with its 95 % interval." in text
    assert "exact McNemar test" in text and "permutation test" in text
    assert "p (Holm) is adjusted over the 3 comparisons shown" in text
    assert "- rtn at w4a6: block 3 fell back to nearest" in text
    assert "Evaluation samples: read 100, speech 100, tale 100." in text


def test_tasks_of_one_record_only_are_named() -> None:
    first = base()
    second = other(data="e" * 64)
    for section in (first.outcomes, first.scores):
        section.pop("tale")
    second.outcomes["speech"] = {}
    second.outcomes["sum"] = {"exact_match": hits(AFTER).to_dict()}
    text = compare([first, second])
    assert [row["task"] for row in cells(text)] == ["read"]
    assert "- Not compared, for rtn at w4a6 lacks what float has: speech wer." in text
    assert "- Not compared, for float lacks what rtn at w4a6 has: tale perplexity, sum exact match." in text
    assert "- Samples of float and rtn at w4a6 are paired by their ids: other tasks, other hash." in text


def test_csv_has_full_precision_and_no_notes() -> None:
    records = [base(), other()]
    found = list(csv.DictReader(io.StringIO(compare(records, "csv"))))
    read, speech, tale = found
    expected = paired(hits(BEFORE), hits(AFTER))
    assert expected.interval is not None
    assert [float(read[key]) for key in ("difference", "low", "high", "p")] == [
        expected.difference,
        *expected.interval,
        expected.p_value,
    ]
    assert (float(read["base"]), float(read["base.standard_error"])) == (0.9, standard_error(hits(BEFORE)))
    assert float(read["compared"]) == 0.64
    assert (read["lost"], read["gained"], read["changed"], read["test"]) == ("30", "4", "", "mcnemar")
    assert (read["significant"], speech["significant"], tale["significant"]) == ("True", "False", "True")
    assert (tale["test"], tale["lost"], tale["n"]) == ("sign_flip", "", "100")
    assert (read["base.identity"], read["compared.identity"]) == ("none-identity", "rtn-identity")


def test_latex_is_escaped() -> None:
    text = compare([base(), other()], "latex")
    assert r"read & exact match $\uparrow$ & w4a6" in " ".join(text.split())
    assert r"[95 \%]" in text and "% base is float" in text


def test_an_interval_that_does_not_exist_is_a_dash() -> None:
    single = [
        make_record(name, {"tale": [Outcomes("perplexity", False, ids(1), (nll,), (10,), "exp")]})
        for name, nll in (("none", 30.0), ("rtn", 40.0))
    ]
    row = cells(compare(single))[0]
    assert row["difference [95 %]"].endswith("[-]")
    assert (row["base"], row["p"]) == ("20.09", "1.000")
    assert (next(csv.DictReader(io.StringIO(compare(single, "csv")))))["low"] == ""


def without_outcomes() -> RunRecord:
    record = other()
    record.outcomes = {}
    return record


def changed(change: Callable[[dict[str, dict[str, dict[str, Any]]]], object]) -> RunRecord:
    record = other()
    change(record.outcomes)
    return record


@pytest.mark.parametrize(
    ("records", "message"),
    [
        (lambda: [], r"needs at least two records \(got: 0\)\. Name the base, then the others"),
        (lambda: [base()], r"at least two records \(got: 1\)"),
        (
            lambda: [base(), without_outcomes()],
            r"outcome of every sample \(got: rtn at w4a6, identity rtn-identity, has none\)\. Run it again with this "
            "version of masq and another output.root",
        ),
        (
            lambda: [base(), make_record("rtn", {"read": [hits(AFTER[:50])]})],
            r"only on the same samples \(got: float and rtn at w4a6 have others: read 100 and 50 samples\)\. Evaluate "
            "both on the same data: evaluation.source, split and samples_per_task",
        ),
        (
            lambda: [base(), changed(lambda found: found["tale"]["perplexity"].update(samples="0" * 64))],
            r"same samples .*tale 100 and 100 samples",
        ),
        (
            lambda: [base(), other(data="e" * 64)],
            r"same data \(got: samples of the same ids differ: float d{16}, rtn at w4a6 e{16}\)\. Evaluate both",
        ),
        (
            lambda: [base(), make_record("rtn", {"sum": [hits(AFTER)]})],
            r"task and metric in common \(got: float: read exact match, speech wer, tale perplexity; rtn at w4a6: sum",
        ),
        (
            lambda: [base(), changed(lambda found: found["read"]["exact_match"].pop("groups"))],
            r"rtn at w4a6, read exact_match: outcomes must hold exactly metric",
        ),
        (
            lambda: [base(), changed(lambda found: found["read"]["exact_match"].update(groups=list(range(100))))],
            r"paired outcomes must agree in groups \(got: other clusters\)",
        ),
    ],
)
def test_what_cannot_be_compared(records: Callable[[], list[RunRecord]], message: str) -> None:
    with pytest.raises(DataError, match=message):
        compare(records())


def test_unknown_format() -> None:
    with pytest.raises(ConfigError, match=r"unknown format of comparisons \(got: markdwon\)\. Did you mean markdown"):
        compare([base(), other()], "markdwon")


def test_the_command_compares_files_and_folders(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_record(base(), tmp_path / "float.json")
    write_record(other(), tmp_path / "run" / "record.json")
    names = [str(tmp_path / "float.json"), str(tmp_path / "run")]
    assert cli.main(["compare", *names]) == 0
    assert capsys.readouterr().out == compare([base(), other()]) + "\n"
    target = tmp_path / "tables" / "c.csv"
    assert cli.main(["compare", *names, "--format", "csv", "--output", str(target)]) == 0
    assert target.read_text() == compare([base(), other()], "csv") + "\n"
    assert capsys.readouterr().out == ""
    assert cli.main(["compare", names[0]]) == 2
    assert "masq: error: a comparison needs at least two records (got: 1)" in capsys.readouterr().err
    assert cli.main(["compare", names[0], str(tmp_path / "nowhere")]) == 2
    assert "no record.json there" in capsys.readouterr().err


def test_the_command_imports_neither_torch_nor_scipy(tmp_path: Path) -> None:
    for index, record in enumerate((base(), other())):
        write_record(record, tmp_path / f"{index}.json")
    code = (
        "import sys; from masq.cli import main; code = main(sys.argv[1:]); "
        "print(sorted({'torch', 'scipy', 'jiwer'} & set(sys.modules))); sys.exit(code)"
    )
    arguments = [sys.executable, "-c", code, "compare", str(tmp_path / "0.json"), str(tmp_path / "1.json")]
    answer = subprocess.run(arguments, capture_output=True, text=True, check=False)
    assert answer.returncode == 0, answer.stderr
    assert answer.stdout.endswith("\n[]\n")


def test_records_of_earlier_releases_are_read_and_refused_with_the_remedy(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, record in (("a", base()), ("b", other())):
        write_record(record, tmp_path / f"{name}.json")
        content = json.loads((tmp_path / f"{name}.json").read_text())
        del content["outcomes"]
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
        assert read_record(tmp_path / f"{name}.json").outcomes == {}
    assert cli.main(["table", str(tmp_path / "a.json")]) == 0
    capsys.readouterr()
    assert cli.main(["compare", str(tmp_path / "a.json"), str(tmp_path / "b.json")]) == 2
    assert "float, identity none-identity, has none). Run it again" in capsys.readouterr().err
