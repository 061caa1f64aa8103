"""Writes `greedy.json`: what transformers + PyTorch generates greedily from the built-in model, so that the tests need neither.

In the top folder, with the extra `parity` installed: python -m tests.golden.make_greedy
"""

import json
import pathlib

import torch
import transformers

import eesd_jax
from benchmarks import torch_reference

GOLDEN = pathlib.Path(__file__).with_name("greedy.json")
NEW_TOKENS = 64
PROMPTS = (
    "Why is the sky blue?",
    "hello",
    "Tell me a joke about a cat and a keyboard.",
    "What is the capital of Australia, and what is it known for?",
    "Write a haiku about rain on a tin roof.",
    "Give me three tips for sleeping better.",
    "Write a Python function that returns the n-th Fibonacci number.",
    "def quicksort(items):\n    ",
    "Explain this SQL:\nSELECT name, COUNT(*) FROM visits GROUP BY name HAVING COUNT(*) > 3;",
    'Write a C program that prints "hi" ten times.',
    "What is 17 * 23? Show your work.",
    "A train travels 180 km in 2.5 hours. What is its average speed in km/h?",
    "Solve for x: 3x + 7 = 22.",
    "Traduis en français : « The weather is nice today. »",
    "¿Cuáles son los colores del arco iris?",
    "Nenne drei deutsche Städte an der Elbe.",
    "日本で一番高い山は何ですか?",
    'Return a JSON object with the keys "name" and "age" for Ada, who is 36. 🎂',
    [
        {"role": "system", "content": "You answer in one short sentence."},
        {"role": "user", "content": "Who wrote Hamlet?"},
    ],
    [
        {"role": "user", "content": "I have two apples and buy three more."},
        {"role": "assistant", "content": "Then you have five apples."},
        {"role": "user", "content": "I eat one. How many are left?"},
    ],
)


def main() -> None:
    engine = eesd_jax.load("demo", dtype="float32")
    model = torch_reference.load_model()
    records = []
    for prompt in PROMPTS:
        ids = engine.encode(prompt, chat=True)
        token_ids, gaps = torch_reference.generate_with_gaps(model, ids, NEW_TOKENS)
        records.append({"prompt": prompt, "prompt_ids": ids, "token_ids": token_ids, "top2_gaps": [round(gap, 4) for gap in gaps]})
        print(f"{min(gaps):.4f}  {prompt!r}")
    made_with = f"transformers {transformers.__version__}, torch {torch.__version__}, float32, greedy, EOS ignored"
    lines = ",\n".join(json.dumps(record, ensure_ascii=False) for record in records)
    GOLDEN.write_text(f'{{"made_with": {json.dumps(made_with)}, "records": [\n{lines}\n]}}\n', encoding="utf-8")


if __name__ == "__main__":
    main()
