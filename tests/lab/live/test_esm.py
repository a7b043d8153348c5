"""Are the modules of a figure joined into one that says the same, or refused?"""

from pathlib import Path

import pytest

from gradprune.lab.live import esm


def write(folder: Path, **files: str) -> Path:
    for name, text in files.items():
        (folder / f"{name}.js").write_text(text)
    return folder


def test_a_file_stands_once_and_after_what_it_imports(tmp_path: Path) -> None:
    write(
        tmp_path,
        base="export const one = 1;\n",
        middle='import { one } from "./base.js";\nexport function two() {\n  return one + one;\n}\n',
        top='import { one } from "./base.js";\nimport {\n  two,\n} from "./middle.js";\n'
        "export const render = () => one + two();\n",
    )
    text = esm.joined("top.js", tmp_path)
    assert [line for line in text.splitlines() if line] == [
        "const one = 1;",
        "function two() {",
        "  return one + one;",
        "}",
        "const render = () => one + two();",
        "export default { render };",
    ]


@pytest.mark.parametrize(
    ("second", "says"),
    [
        ("export const one = 2;\n", r"base\.js and top\.js both define 'one'"),
        ('import { three } from "./base.js";\n', r"top\.js imports three, which base\.js does not export"),
        ('import three from "./base.js";\n', r"top\.js has a line that cannot be joined: 'import three"),
        ("export default {};\n", r"top\.js has a line that cannot be joined: 'export default"),
    ],
)
def test_what_cannot_be_joined_is_refused_by_name(tmp_path: Path, second: str, says: str) -> None:
    write(tmp_path, base="export const one = 1;\n", top='import { one } from "./base.js";\n' + second)
    with pytest.raises(ValueError, match=says):
        esm.joined("top.js", tmp_path)
