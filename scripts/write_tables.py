"""Write the tables of README.md and docs/ from the committed JSON in docs/results.

A table stands between `<!-- begin NAME -->` and `<!-- end NAME -->`; nothing else of a file is touched. With --check
nothing is written, and the exit code says whether every table is up to date.
"""

from __future__ import annotations

import re
import sys

from encoder_tables import encoder_table
from experiment_tables import counted_memory_table, feeding_table, headline_table, memory_table
from fidelity_tables import cost_table, fidelity_tables, motion_tables, paired_tables
from gpu_tables import gpu_counted_table, gpu_tables, gpu_targets_table
from markdown_tables import ROOT
from performance_tables import (
    adapters_table,
    compare_table,
    decode_table,
    frames_table,
    skipping_table,
    suite_tables,
    summary_table,
    targets_table,
)
from reference_tables import reference_tables, trials_table
from small_tables import small_tables
from stream_tables import long_videos_table, stored_tokens_table

PAGES = (
    ROOT / "README.md",
    ROOT / "docs" / "performance.md",
    ROOT / "docs" / "results.md",
    ROOT / "docs" / "adapters.md",
    ROOT / "docs" / "fidelity.md",
    ROOT / "docs" / "reference-model.md",
    ROOT / "docs" / "streams-and-corpora.md",
)
TABLES = {
    "compare": compare_table,
    "benchmark": summary_table,
    "suites": suite_tables,
    "targets": targets_table,
    "decode": decode_table,
    "frames": frames_table,
    "skipping": skipping_table,
    "feeding": feeding_table,
    "memory": memory_table,
    "counted": counted_memory_table,
    "headline": headline_table,
    "gpu_targets": gpu_targets_table,
    "gpu": gpu_tables,
    "gpu_counted": gpu_counted_table,
    "adapters": adapters_table,
    "encoders": encoder_table,
    "small": small_tables,
    "cost": cost_table,
    "fidelity": fidelity_tables,
    "paired": paired_tables,
    "motion": motion_tables,
    "reference": reference_tables,
    "trials": trials_table,
    "stored_tokens": stored_tokens_table,
    "long_videos": long_videos_table,
}


def main() -> int:
    """Fill every table; return 1 if `--check` found one that is out of date."""
    check = "--check" in sys.argv[1:]
    stale = []
    for page in PAGES:
        before = page.read_text(encoding="utf-8")
        after = re.sub(
            r"(<!-- begin (\w+) -->\n).*?(<!-- end \2 -->)",
            lambda match: match[1] + TABLES[match[2]]() + match[3],
            before,
            flags=re.DOTALL,
        )
        if after != before:
            stale.append(page.name)
            if not check:
                page.write_text(after, encoding="utf-8")
    if check and stale:
        print(f"out of date: {', '.join(stale)}; run make benchmark-tables")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
