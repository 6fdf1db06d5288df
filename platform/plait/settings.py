"""Where things are: the project (the folder with feature_store.yaml) and Plait's home below it."""

from __future__ import annotations

import getpass
import os
from dataclasses import dataclass
from pathlib import Path

from plait.errors import SettingsError


@dataclass(frozen=True, kw_only=True, slots=True)
class Home:
    """One project and the folder that holds all of its data; both paths are absolute."""

    project: Path
    root: Path

    @property
    def events(self) -> Path:
        """Event tables: impressions, feedback, users, items, and the server's own log segments."""
        return self.root / "events"

    @property
    def features(self) -> Path:
        """Feature tables, one folder of parquet parts each; Feast reads them."""
        return self.root / "features"

    @property
    def samples(self) -> Path:
        return self.root / "samples"

    @property
    def datasets(self) -> Path:
        return self.root / "datasets"

    @property
    def models(self) -> Path:
        """Artifacts: models/NAME/VERSION/."""
        return self.root / "models"

    @property
    def plait_db(self) -> Path:
        """SQLite file of the model registry and the experiment store."""
        return self.root / "plait.db"

    @property
    def clock_file(self) -> Path:
        return self.root / "clock.json"

    def create(self) -> Home:
        """Make the folders; safe to call again."""
        for folder in (self.events, self.features, self.samples, self.datasets, self.models):
            folder.mkdir(parents=True, exist_ok=True)
        return self


def find_home(start: Path | None = None) -> Home:
    """The project at or above `start` (default: the working directory) and its home.

    PLAIT_HOME names the home; without it, it is `.plait/` beside feature_store.yaml.
    Raises SettingsError if no folder upwards holds a feature_store.yaml.
    """
    here = (start or Path.cwd()).resolve()
    for folder in (here, *here.parents):
        if (folder / "feature_store.yaml").is_file():
            root = Path(os.environ.get("PLAIT_HOME") or folder / ".plait")
            return Home(project=folder, root=root if root.is_absolute() else folder / root)
    raise SettingsError(f"no feature_store.yaml in {here} or above it; run plait from a Plait project")


def author_name(given: str | None = None) -> str:
    """Who makes a change: as given, else PLAIT_AUTHOR, else the login's name. SettingsError if there is none."""
    name = (given or os.environ.get("PLAIT_AUTHOR") or "").strip()
    if name:
        return name
    try:
        return getpass.getuser()
    except (KeyError, OSError) as error:
        raise SettingsError("this login has no name; say who you are with --author or PLAIT_AUTHOR") from error
