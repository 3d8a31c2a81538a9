"""The measurements as a table, as JSON and as a plot."""

import json
import platform
import subprocess
import sys
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any


@dataclass(frozen=True, slots=True)
class Measure:
    """One line of the table."""

    name: str
    unit: str
    more_is_better: bool = True
    digits: int = 0


@dataclass(slots=True)
class Report:
    """Every value of every round, by measure and carrier."""

    measures: list[Measure]
    carriers: list[str]
    values: dict[tuple[str, str], list[float]] = field(default_factory=dict)

    def add(self, measure: str, carrier: str, value: float) -> None:
        self.values.setdefault((measure, carrier), []).append(value)

    def median(self, measure: str, carrier: str) -> float | None:
        found = self.values.get((measure, carrier))
        return median(found) if found else None

    def ratio(self, measure: str, carrier: str, other: str) -> float | None:
        one, two = self.median(measure, carrier), self.median(measure, other)
        return one / two if one is not None and two else None

    def table(self, against: str) -> str:
        """Markdown: medians of all rounds, and in brackets the ratio to `against`."""
        rows = [["", *self.carriers], ["---", *("---:" for _ in self.carriers)]]
        for measure in self.measures:
            row = [f"{measure.name}, {measure.unit}"]
            for carrier in self.carriers:
                value, ratio = self.median(measure.name, carrier), self.ratio(measure.name, carrier, against)
                text = "–" if value is None else f"{value:,.{measure.digits}f}"
                row.append(text if ratio is None or carrier == against else f"{text} ({ratio:.2f} ×)")
            if any(self.median(measure.name, carrier) is not None for carrier in self.carriers):
                rows.append(row)
        return "\n".join(f"| {' | '.join(row)} |" for row in rows)

    def as_json(self, command: str) -> str:
        found: dict[str, Any] = {"command": command, "machine": machine(), "versions": versions(), "measures": {}}
        for measure in self.measures:
            values = {carrier: self.values[key] for carrier in self.carriers if (key := (measure.name, carrier)) in self.values}
            found["measures"][measure.name] = {"unit": measure.unit, "more_is_better": measure.more_is_better} | values
        return json.dumps(found, indent=1, ensure_ascii=False)

    def plot(self, path: Path, against: str) -> None:
        """Each measure's ratio to `against`, as bars to the right where it is better. Needs matplotlib."""
        import matplotlib as mpl

        mpl.use("svg")
        from matplotlib import pyplot

        shown = [measure for measure in self.measures if self.ratio(measure.name, against, against) is not None]
        carriers = [carrier for carrier in self.carriers if carrier != against]
        figure, axes = pyplot.subplots(figsize=(9, 0.5 + 0.5 * len(shown)), layout="constrained")
        for index, carrier in enumerate(carriers):
            places, bars = [], []
            for row, measure in enumerate(shown):
                ratio = self.ratio(measure.name, carrier, against)
                if ratio:
                    places.append(row + (index - (len(carriers) - 1) / 2) * 0.8 / len(carriers))
                    bars.append(ratio if measure.more_is_better else 1 / ratio)
            axes.barh(places, [bar - 1 for bar in bars], left=1, height=0.8 / len(carriers), label=carrier)
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g} ×")
        axes.axvline(1, color="black", linewidth=1)
        axes.set_yticks(range(len(shown)), [measure.name for measure in shown])
        axes.invert_yaxis()
        axes.set_xlabel(f"better than {against} (= 1 ×) to the right")
        axes.legend(loc="best")
        figure.savefig(path)


def machine() -> dict[str, str]:
    """What the figures depend on besides the programs."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "processor": f"{len(models)} x {models[0] if models else platform.machine()}",
        "kernel": platform.release(),
        "python": sys.version.split()[0],
    }


def versions() -> dict[str, str]:
    found = {name: version(name) for name in ("cryptography", "numpy", "uvloop", "grpclib", "h2")}
    iperf = subprocess.run(["iperf3", "--version"], capture_output=True, text=True, check=True).stdout
    return found | {"iperf3": iperf.split("\n")[0].split()[1]}
