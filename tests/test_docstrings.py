"""Do the docstrings of what users call have the parts of torch's own, and do their examples run?"""

import doctest
import inspect
import re

import pytest
import torch
from torch import nn

import gradprune as gp
from gradprune.weights import allocate

# Public beside the names of the package, and on its pages.
FURTHER = {f"weights.allocate.{name}": getattr(allocate, name) for name in ("uniform", "erk", "lamp", "share_out")}
# What functions return and nobody makes: each is shown by what returns it.
RESULTS = {"Entry", "Event", "History", "Hold", "Packed", "Report", "Round", "Row", "Trace"}
RESULTS |= {"CrossValidation", "Found", "Look", "Plan", "Sensitivity", "Study", "Trial"}
RESULTS |= {"Compressed", "Exported", "Quantized", "Reconstructed", "Shared"}


def methods(name, kind):
    """The public methods and properties that a class defines itself."""
    for attribute, value in vars(kind).items():
        unwrapped = value.__func__ if isinstance(value, classmethod | staticmethod) else value
        if not attribute.startswith("_") and (inspect.isfunction(unwrapped) or isinstance(value, property)):
            yield f"{name}.{attribute}", unwrapped


OBJECTS = {name: getattr(gp, name) for name in gp.__all__} | FURTHER
MEMBERS = dict(pair for name, value in OBJECTS.items() if inspect.isclass(value) for pair in methods(name, value))
CALLABLES = {name: value for name, value in (OBJECTS | MEMBERS).items() if not isinstance(value, property)}


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """Where an example may write files, with the random state that every reader starts from."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)


@pytest.mark.usefixtures("elsewhere")
@pytest.mark.parametrize("name", OBJECTS | MEMBERS)
def test_the_example_of_a_docstring_runs(name):
    value = (OBJECTS | MEMBERS)[name]
    names = vars(inspect.getmodule(value)) if name in OBJECTS else {}
    known = names | {"gp": gp, "torch": torch, "nn": nn}
    example = doctest.DocTestParser().get_doctest(documentation(value), known, name, name, 0)
    said = []
    flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    failed = doctest.DocTestRunner(optionflags=flags).run(example, out=said.append).failed
    assert not failed, "".join(said)


def test_every_public_name_has_an_example():
    lacking = [name for name in gp.__all__ if name not in RESULTS and ">>> " not in documentation(OBJECTS[name])]
    assert not lacking, f"no example: {', '.join(lacking)}"


def test_every_docstring_starts_with_one_line():
    """Of at most 120 characters, ended by a full stop and followed by nothing or an empty line."""
    wrong = []
    for name, value in (OBJECTS | MEMBERS).items():
        first, *rest = documentation(value).split("\n")
        if not first.endswith(".") or (rest and rest[0]):
            wrong.append(f"{name}: {first}")
    assert not wrong, "\n".join(wrong)


def test_every_argument_is_described():
    names = sorted(CALLABLES.keys() - RESULTS)
    lacking = [f"{name}: {', '.join(missing)}" for name in names if (missing := undescribed_arguments(name))]
    assert not lacking, "\n".join(["no Args:", *lacking])


def test_every_result_is_described():
    """In a section of its own; a method may do it in its first lines, or where it has no arguments by its name."""
    lacking = [name for name in CALLABLES if returns(name) and not describes_result(name)]
    assert not lacking, f"no Returns: {', '.join(lacking)}"


def test_every_function_that_checks_its_arguments_says_what_it_raises():
    """Every public function with arguments refuses some; a method may leave that to its class."""
    functions = [name for name, value in OBJECTS.items() if inspect.isfunction(value)]
    lacking = [name for name in functions if not section(name, "Raises")]
    assert not lacking, f"no Raises: {', '.join(lacking)}"


def undescribed_arguments(name):
    """The arguments that have no entry under ``Args``; a dataclass may describe its fields under ``Attributes``."""
    described = section(name, "Args") + section(name, "Attributes")
    entries = set(re.findall(r"^\*{0,2}(\w+)(?:, (?:\*{0,2}\w+))*:", described, re.MULTILINE))
    for line in re.findall(r"^((?:\*{0,2}\w+, )+\*{0,2}\w+):", described, re.MULTILINE):
        entries |= set(re.findall(r"\w+", line))
    parameters = [p for p in inspect.signature(CALLABLES[name]).parameters if p not in ("self", "cls")]
    one_alone = inspect.isfunction(CALLABLES[name]) and name in MEMBERS and len(parameters) == 1
    if one_alone and f"`{parameters[0]}`" in documentation(CALLABLES[name]):
        return []  # a short method says in its line what its one argument is
    return [parameter for parameter in parameters if parameter not in entries]


def returns(name):
    value = CALLABLES[name]
    annotated = None if inspect.isclass(value) else inspect.signature(value).return_annotation
    return annotated not in (None, "None", "NoReturn", inspect.Signature.empty)


def describes_result(name):
    without_arguments = not [p for p in inspect.signature(CALLABLES[name]).parameters if p not in ("self", "cls")]
    opening = re.split(r"\n\s*\n", documentation(CALLABLES[name]))[0]
    told = name in MEMBERS and (without_arguments or re.search(r"[Rr]eturn|^(The|Whether)", opening))
    return bool(section(name, "Returns") or told)


def section(name, title):
    """The text of one section of a docstring, by the rules of Google's style: what is indented under its title."""
    found = re.search(rf"^{title}:\n((?:[ ]{{4}}.*\n?|\n)+)", documentation(CALLABLES[name]), re.MULTILINE)
    return inspect.cleandoc(found[1]) if found else ""


def documentation(value):
    return inspect.getdoc(value) or ""
