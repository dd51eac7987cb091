"""Print constraints for pip: the lowest version of everything that pyproject.toml asks for, but for benchmarks.

A requirement whose marker does not hold for the Python that runs this is left out.
"""

from __future__ import annotations

import sys

from packaging.requirements import Requirement

try:
    import tomllib
except ImportError:  # Python 3.10
    import tomli as tomllib

with open("pyproject.toml", "rb") as file:
    pyproject = tomllib.load(file)
project = pyproject["project"]
extras = {
    name: texts for name, texts in project["optional-dependencies"].items() if name not in ("bench", "dev", "examples")
}
lowest: dict[str, str] = {}
for text in [
    *pyproject["build-system"]["requires"],
    *project["dependencies"],
    *(t for texts in extras.values() for t in texts),
]:
    requirement = Requirement(text)
    if requirement.name == project["name"] or (requirement.marker and not requirement.marker.evaluate()):
        continue
    bounds = [s.version for s in requirement.specifier if s.operator == ">="]
    if len(bounds) != 1 or lowest.setdefault(requirement.name, bounds[0]) != bounds[0]:
        sys.exit(f"{text}: not one lower bound, or not the same everywhere")
for name, version in sorted(lowest.items()):
    print(f"{name}=={version}")
