"""Chapter 10: which lines of document 1's program does TensorFlow 2 run?

`python chapters/experiments/document_1_tensorflow.py` writes chapters/results/document_1_tensorflow.json. It needs
TensorFlow, which nothing else here does, so it stands by itself: `pip install tensorflow-cpu` in an environment of its
own. Each line is tried alone, on arrays of the shapes that the document's data set has.
"""

from __future__ import annotations

import datetime
import json
import os
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"

import numpy as np
import tensorflow as tf  # type: ignore[import-not-found]


def network() -> Any:
    """Return document 1's three layers, compiled as it does."""
    layers = [
        tf.keras.layers.Dense(64, "relu"),
        tf.keras.layers.Dense(32, "relu"),
        tf.keras.layers.Dense(10, "softmax"),
    ]
    model = tf.keras.Sequential(layers)
    model.compile(optimizer="adam", loss=tf.keras.losses.CategoricalCrossentropy())
    return model


images, digits = np.zeros((64, 28, 28), "float32"), np.arange(64) % 10
pair = ((images, digits), (images, digits))  # as mnist.load_data() returns it
one_hot = tf.keras.utils.to_categorical(digits, num_classes=10)
variable = tf.Variable([1.0, 2.0])
LINES: dict[str, Callable[[], object]] = {
    "inputs, labels = load_data(); inputs / 255.0": lambda: pair[0] / 255.0,  # type: ignore[operator]
    "fit, images of 28 by 28 as they are": lambda: network().fit(images, one_hot, verbose=0),
    "fit, images as rows of 784": lambda: network().fit(images.reshape(64, -1), one_hot, verbose=0),
    "tf.nn.softmax_cross_entropy_with_logits_v2": lambda: tf.nn.softmax_cross_entropy_with_logits_v2,
    "weight.assign(gradient)": lambda: variable.assign([3.0, 4.0]),
    "weight.assign(gradient).apply()": lambda: variable.assign([3.0, 4.0]).apply(),
}


def outcome(line: Callable[[], object]) -> str:
    """Return "runs", or the kind of error."""
    try:
        line()
    except Exception as error:
        return type(error).__name__
    return "runs"


if __name__ == "__main__":
    entries: dict[str, Any] = {
        "about": "each line tried alone",
        "command": "python chapters/experiments/document_1_tensorflow.py",
        "seeds": [],
        "versions": {"python": platform.python_version(), "tensorflow": tf.__version__, "numpy": np.__version__},
        "machine": platform.machine(),
        "date": datetime.date.today().isoformat(),
    }
    rows = ",\n".join(f"  {json.dumps({'line': name, 'outcome': outcome(line)})}" for name, line in LINES.items())
    head = [f" {json.dumps(name)}: {json.dumps(value)}" for name, value in entries.items()]
    text = "{\n" + ",\n".join([*head, f' "rows": [\n{rows}\n ]']) + "\n}\n"
    Path("chapters/results/document_1_tensorflow.json").write_text(text)
