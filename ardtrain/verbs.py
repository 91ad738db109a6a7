"""What `ardtrain VERB --help` prints: the verb's lines of the usage, what else there is to say, and an example."""

from __future__ import annotations

PRINT_THEIR_OWN = ("plan", "submit", "doctor")  # their parsers know their options; the example follows
EXAMPLES = {
    "train": "ardtrain train run.yaml learning_rate=2e-4 resume_from_checkpoint=auto",
    "validate": "ardtrain validate run.yaml --schema-only",
    "plan": "ardtrain plan run.yaml --gpus 16 --gpu h100",
    "fetch": "ardtrain fetch run.yaml",
    "submit": "ardtrain submit run.yaml --to slurm --dry-run launcher.nodes=2",
    "doctor": "ardtrain doctor --hosts node1,node2 run.yaml",
    "status": "ardtrain status runs/e2e_nlg",
    "stop": "ardtrain stop runs/e2e_nlg --wait 600",
    "report": "ardtrain report runs/elalora runs/lora --out compare.html --watch 30",
    "ranks": "ardtrain ranks runs/e2e_nlg --heads q_proj",
    "compare": "ardtrain compare benchmarks/suites/e2e_nlg.yaml",
    "new": "ardtrain new --task sft --model meta-llama/Llama-3.1-8B --out run.yaml",
    "suggest": "ardtrain suggest run.yaml --gpus 8 --out better.yaml",
    "export": "ardtrain export runs/e2e_nlg --to peft --out adapter",
    "merge": "ardtrain merge runs/e2e_nlg --out merged",
    "evaluate": "ardtrain evaluate runs/e2e_nlg --data test.jsonl",
    "schema": "ardtrain schema > ardtrain.schema.json",
}
_INDENT = "       ardtrain "  # of a verb's line in the usage; its further lines are indented more


def help_text(verb: str, usage: str) -> str:
    """The verb's part of `usage`, and its example."""
    lines: list[str] = []
    inside = False
    for line in usage.replace("usage: ardtrain ", _INDENT, 1).splitlines():
        begins = line.startswith(_INDENT)
        words = line.removeprefix(_INDENT).split() if begins else [""]
        if begins or not line.strip():
            inside = begins and words[0].strip("[]") == verb
        if inside:
            lines.append(line)
    return "\n".join(["usage:", *lines, "", example_text(verb)])


def example_text(verb: str) -> str:
    """One line that can be typed."""
    return f"example: {EXAMPLES[verb]}"
