"""A model folder in the layout of a model hub's cache, for clients that find a tokenizer only there when there is no network.

HF_HOME=FOLDER HF_HUB_OFFLINE=1 aiperf profile --tokenizer local/model ...

python -m tests.support.clients.hub_cache MODEL_FOLDER FOLDER
"""

import sys
from pathlib import Path

NAME = "local/model"
REVISION = "0" * 40


def make_hub_cache(model: Path, home: Path, name: str = NAME) -> str:
    """Puts links to the files of a model into `home`, which is to be `HF_HOME`; returns the name of the model there."""
    repository = home / "hub" / f"models--{name.replace('/', '--')}"
    snapshot = repository / "snapshots" / REVISION
    snapshot.mkdir(parents=True, exist_ok=True)
    (repository / "refs").mkdir(exist_ok=True)
    (repository / "refs" / "main").write_text(REVISION)
    for file in model.iterdir():
        link = snapshot / file.name
        if not link.exists():
            link.symlink_to(file.resolve())
    return name


if __name__ == "__main__":
    print(make_hub_cache(Path(sys.argv[1]), Path(sys.argv[2])))
