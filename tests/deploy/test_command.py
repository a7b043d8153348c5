"""The command line does what its help says: its answers in text and JSON, its exit codes, its words."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import gradprune as gp
from gradprune.deploy import command
from gradprune.deploy.command import main

SOURCE = Path(__file__).parents[2] / "src"
COMMANDS = ("prune", "report", "pack", "unpack", "diff")


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TQDM_DISABLE", "1")  # so that it is as it was after a --quiet
    torch.manual_seed(0)
    tensors = {f"h.{i}.fc.weight": torch.randn(20, 30) for i in range(12)}
    save_file(tensors | {"embed.weight": torch.randn(9, 20), "norm.weight": torch.ones(20)}, "m.safetensors")


def answer(capsys, *words):
    """The exit code, and what was said on standard output and standard error."""
    code = main([*map(str, words)])
    said = capsys.readouterr()
    return code, said.out, said.err


def told(capsys, *words):
    code, out, _ = answer(capsys, *words, "--json")
    return code, json.loads(out)


def test_prune_writes_the_file_and_says_what_went(capsys):
    code, out, err = answer(capsys, "prune", "m.safetensors", "p.safetensors", "--sparsity", "0.5")
    assert code == 0
    assert sum(int((t == 0).sum()) for t in load_file("p.safetensors").values()) == 3600
    assert "3,600 of 7,200 weights go (50.00%)" in out
    assert re.search(r"^h\.\*\.fc\.weight +12 +F32 +20 x 30 +600 +\d\d\.\d to \d\d\.\d%$", out, re.MULTILINE)
    assert re.search(r"^embed\.weight +1 .* is looked up or added, as an embedding, by its name$", out, re.MULTILINE)
    assert "note: which tensors are weights was told by their names: --dry-run lists them" in err


def test_json_has_each_tensor_and_nothing_else_is_on_standard_output(capsys):
    code, found = told(capsys, "prune", "m.safetensors", "p.safetensors", "--sparsity", "0.25", "--scope", "layer")
    assert code == 0
    assert (found["command"], found["pruned"], found["weights"], found["sparsity"]) == ("prune", 1800, 7200, 0.25)
    assert len(found["tensors"]) == 14
    by_name = {row["name"]: row for row in found["tensors"]}
    assert by_name["h.11.fc.weight"] == {
        "name": "h.11.fc.weight",
        "dtype": "F32",
        "shape": [20, 30],
        "weights": 600,
        "kept": 450,
        "reason": "",
    }
    assert by_name["norm.weight"]["kept"] is None
    assert "has 1 dimension" in by_name["norm.weight"]["reason"]


def test_every_option_of_prune_reaches_it(capsys):
    words = ["--include", "h.1*", "--include", "h.2.*", "--exclude", "*.11.*", "--sparsity", "0.1", "--scope", "row"]
    code, found = told(capsys, "prune", "m.safetensors", "--dry-run", *words)
    assert code == 0
    assert [row["name"] for row in found["tensors"] if not row["reason"]] == [f"h.{i}.fc.weight" for i in (1, 2, 10)]
    assert found["pruned"] == 3 * 20 * 3
    assert not Path("p.safetensors").exists()
    code, out, _ = answer(capsys, "prune", "m.safetensors", "--dry-run", "--granularity", "2:5", "--by-name")
    assert code == 0
    assert "4,320 of 7,200 weights would go (60.00%)" in out
    assert "to be pruned" in out


def test_report_counts(capsys):
    main(["prune", "m.safetensors", "p.safetensors", "--sparsity", "0.9", "--scope", "layer", "--quiet"])
    capsys.readouterr()
    code, out, _ = answer(capsys, "report", "p.safetensors")
    assert code == 0
    assert re.search(r"^h\.\*\.fc\.weight +12 +F32 +20 x 30 +600 +90\.0% +28\.8 kB +3\.78 kB$", out, re.MULTILINE)
    assert re.search(r"^tensor +\S* *dtype +shape +entries +zeros +bytes +packed$", out, re.MULTILINE)
    assert "14 tensors, 1 file: 7,400 entries, 6,480 zeros" in out
    assert "of the 7,200 weights, by their names, 90.00% are zero" in out
    _, found = told(capsys, "report", "p.safetensors")
    assert (found["sparsity"], found["files"], found["zeros"]) == (0.9, 1, 6480)


def test_pack_and_unpack_give_the_same_file_and_diff_agrees(capsys):
    main(["prune", "m.safetensors", "p.safetensors", "--sparsity", "0.9", "--quiet"])
    capsys.readouterr()
    code, out, _ = answer(capsys, "pack", "p.safetensors", "k.safetensors")
    assert code == 0
    assert re.match(r"'k\.safetensors': \d\.\d\d kB instead of 3\d\.\d kB \(\d\d\.\d%\); \d+ of 14 tensors", out)
    code, found = told(capsys, "unpack", "k.safetensors", "again.safetensors")
    assert (code, found["path"]) == (0, "again.safetensors")
    assert Path("again.safetensors").read_bytes() == Path("p.safetensors").read_bytes()
    code, out, _ = answer(capsys, "diff", "p.safetensors", "again.safetensors")
    assert (code, out) == (0, "all 14 tensors are the same\n")


def test_a_packed_file_says_that_it_is_one(capsys):
    main(["prune", "m.safetensors", "p.safetensors", "--sparsity", "0.9", "--quiet"])
    main(["pack", "p.safetensors", "k.safetensors"])
    capsys.readouterr()
    _, found = told(capsys, "report", "k.safetensors")
    assert found["packed"]
    assert found["metadata"] == {}
    assert "note: it is packed" in answer(capsys, "report", "k.safetensors")[2]
    assert not told(capsys, "report", "p.safetensors")[1]["packed"]
    code, _, err = answer(capsys, "prune", "k.safetensors", "q.safetensors", "--sparsity", "0.5")
    assert (code, err) == (2, "gradprune prune: 'k.safetensors' is packed: unpack it first\n")


def test_diff_exits_with_one_and_says_what_became_zero(capsys):
    main(["prune", "m.safetensors", "p.safetensors", "--sparsity", "0.9", "--scope", "layer", "--quiet"])
    capsys.readouterr()
    code, out, _ = answer(capsys, "diff", "m.safetensors", "p.safetensors")
    assert code == command.DIFFER == 1
    assert re.search(
        r"^tensor +times +differs +entries +changed +became zero +came back +largest change$", out, re.MULTILINE
    )
    assert re.search(r"^h\.\*\.fc\.weight +12 +values +600 +540 +540 +0 +[\d.]+$", out, re.MULTILINE)
    assert "12 of 14 tensors differ" in out
    code, found = told(capsys, "diff", "p.safetensors", "m.safetensors")
    assert (code, found["same"]) == (1, False)
    assert sum(row["came_back"] for row in found["tensors"]) == 12 * 540


REFUSED = {
    "no file": (["report", "none.safetensors"], "there is no file or folder 'none.safetensors'"),
    "no sparsity": (["prune", "m.safetensors", "p"], "a sparsity is missing"),
    "no output": (
        ["prune", "m.safetensors", "--sparsity", "0.5"],
        "the output is missing: name it, or ask for a --dry",
    ),
    "a pattern": (["prune", "m.safetensors", "p", "--sparsity", ".5", "--include", "x"], "include pattern 'x' matches"),
    "text": (["report", "text"], "'text' is no safetensors file: it does not begin as one does"),
    "not packed": (["unpack", "m.safetensors", "p"], "'m.safetensors' was not packed"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused_exits_with_two_and_one_sentence(capsys, case):
    words, says = REFUSED[case]
    Path("text").write_text("a text, no tensors")
    before = sorted(Path().iterdir())
    code, out, err = answer(capsys, *words)
    assert (code, out) == (2, "")
    assert err.startswith(f"gradprune {words[0]}: {says}")
    assert err.count("\n") == 1
    code, found = told(capsys, *words)
    assert (code, found["code"], found["command"]) == (2, 2, words[0])
    assert found["error"].startswith(says)
    assert sorted(Path().iterdir()) == before


@pytest.mark.parametrize("words", [[], ["shrink"], ["prune"], ["prune", "a", "b", "--sparsity", "much"]])
def test_words_that_are_no_command_exit_with_two(capsys, words):
    with pytest.raises(SystemExit) as raised:
        main(words)
    assert raised.value.code == 2
    assert "usage: python -m gradprune" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "code", "says"),
    [
        (OSError(28, "no room for 3 GB in '/mnt'"), 3, "no room for 3 GB in '/mnt'"),
        (PermissionError(13, "Permission denied", "m"), 3, "Permission denied: 'm'"),
        (MemoryError(), 3, "MemoryError"),
        (KeyboardInterrupt(), 130, "interrupted; the output is as it was before"),
        (ImportError("files are written by x: pip install x"), 2, "files are written by x: pip install x"),
    ],
)
def test_what_goes_wrong_on_the_way_has_a_code_and_a_sentence(capsys, monkeypatch, error, code, says):
    def failing(*_, **__):
        raise error

    monkeypatch.setattr(command.pruned, "prune_file", failing)
    found, _, err = answer(capsys, "prune", "m.safetensors", "p.safetensors", "--sparsity", "0.5")
    assert found == code
    assert err == f"gradprune prune: {says}\n"


def test_warnings_are_notes(capsys):
    save_file({"a.weight": torch.ones(9, 9), "b.weight": torch.full((2, 2), 1e-9)}, "w.safetensors")
    _, _, err = answer(capsys, "prune", "w.safetensors", "p.safetensors", "--sparsity", "0.5")
    assert "note: ranked with the others, 'b.weight' would become empty" in err
    _, found = told(capsys, "prune", "w.safetensors", "p.safetensors", "--sparsity", "0.5")
    assert any("'b.weight' would become empty" in note for note in found["notes"])
    _, _, err = answer(capsys, "prune", "w.safetensors", "p.safetensors", "--sparsity", "0.5", "--quiet")
    assert err == ""


# --------------------------------------------------------------------------------------------------------------- help


@pytest.mark.parametrize(
    "words", [[], *([name] for name in COMMANDS)], ids=lambda words: " ".join(words) or "gradprune"
)
def test_help_is_there_fits_a_terminal_and_names_every_option(capsys, monkeypatch, words):
    monkeypatch.setenv("COLUMNS", "90")
    with pytest.raises(SystemExit) as raised:
        main([*words, "--help"])
    said = capsys.readouterr().out
    assert raised.value.code == 0
    assert max(map(len, said.splitlines())) <= 90
    for name in COMMANDS if not words else ["--json", "--quiet"]:
        assert name in said
    if words == ["prune"]:
        for option in ("sparsity", "scope", "granularity", "include", "exclude", "dry-run", "by-name"):
            assert f"--{option}" in said


def test_the_exit_codes_of_the_help_are_those_of_the_program(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    said = capsys.readouterr().out
    codes = [int(code) for code in re.findall(r"^  (\d+) +\w", said, re.MULTILINE)]
    wanted = [command.DONE, command.DIFFER, command.REFUSED, command.NOT_WRITTEN, command.INTERRUPTED]
    wanted += [command.UNREAD]
    assert codes == wanted


def test_the_examples_of_the_help_are_commands(capsys, monkeypatch):
    with pytest.raises(SystemExit):
        main(["prune", "--help"])
    lines = re.findall(r"^  python -m gradprune (.*)$", capsys.readouterr().out, re.MULTILINE)
    assert len(lines) == 3
    for line in lines:
        command._parser().parse_args(line.replace("'", "").split())


def test_it_is_run_as_a_module_with_a_bar_of_bytes_where_asked():
    environment = os.environ | {"PYTHONPATH": str(SOURCE)}
    environment.pop("TQDM_DISABLE")
    run = [sys.executable, "-m", "gradprune"]
    done = subprocess.run([*run, "report", "none"], env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "gradprune report: there is no file or folder 'none'\n"
    words = ["prune", "m.safetensors", "p.safetensors", "--sparsity", "0.5", "--json"]
    done = subprocess.run([*run, *words], env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout)["pruned"] == 3600


@pytest.mark.parametrize(
    "words",
    [["--help"], ["prune", "--help"], ["report", "m.safetensors"], ["report", "m.safetensors", "--json"]],
    ids=" ".join,
)
def test_a_reader_that_goes_away_causes_no_traceback(words):
    command = [sys.executable, "-m", "gradprune", *words]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode in ((0, 141) if "--help" in words else (141,))  # argparse may not mind


def test_what_was_to_be_written_is_written_though_nobody_reads_the_answer():
    command = [sys.executable, "-m", "gradprune", "pack", "m.safetensors", "p.safetensors"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        process.stdout.close()
    assert process.returncode == 141
    assert gp.unpack("p.safetensors").keys() == load_file("m.safetensors").keys()


def test_pack_takes_a_code(capsys):
    _, plain = told(capsys, "pack", "m.safetensors", "a.safetensors")
    code, coded = told(capsys, "pack", "m.safetensors", "b.safetensors", "--code", "entropy")
    assert code == 0
    assert coded["bytes_after"] < plain["bytes_after"]
    answer(capsys, "unpack", "b.safetensors", "c.safetensors")
    assert Path("c.safetensors").read_bytes() == Path("m.safetensors").read_bytes()


def test_a_threshold_and_the_least_that_stays_reach_prune(capsys):
    code, out, _ = answer(capsys, "prune", "m.safetensors", "--threshold", "0.5", "--dry-run")
    assert code == 0
    assert "those below 0.5 of 7,200 weights would go (how many is known when all are read)" in out
    _, found = told(capsys, "prune", "m.safetensors", "p.safetensors", "--threshold", "9", "--min-keep", "5")
    assert found["pruned"] == 7200 - 12 * 5
    before, after = load_file("m.safetensors"), load_file("p.safetensors")
    largest = before["h.0.fc.weight"].abs().flatten().topk(5).values.min()
    assert torch.equal(after["h.0.fc.weight"] != 0, before["h.0.fc.weight"].abs() >= largest)
    _, found = told(capsys, "prune", "m.safetensors", "p.safetensors", "--sparsity", "0.5", "--scope", "lamp")
    assert found["pruned"] == 3600
