"""Prints the compatibility table of hf_gatelora/gates/README.md from the cases of the tests."""

from backbones import BACKBONES

BEHAVIOURS = ["forward parity", "train", "fold to stock PEFT", "merge", "resume", "compile"]


def table() -> str:
    """The table as Markdown: one row per backbone, one column per behaviour, refusals below it."""
    refusals: list[str] = []
    rows = [["base", *BEHAVIOURS], ["---"] * (1 + len(BEHAVIOURS))]
    for name, backbone in BACKBONES.items():
        row = [name]
        for behaviour in BEHAVIOURS:
            sentence = backbone["refused"].get(behaviour)
            if sentence is not None:
                refusals.append(sentence)
                row.append(f"refused ({len(refusals)})")
            elif behaviour == "merge" and backbone["merge_error"] > 1e-3:
                row.append(f"✓ ± {backbone['merge_error']:.0%}")
            else:
                row.append("✓")
        rows.append(row)
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join(lines + [f"{i}. {sentence}" for i, sentence in enumerate(refusals, 1)])


if __name__ == "__main__":
    print(table())
