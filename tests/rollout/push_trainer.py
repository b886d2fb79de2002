"""A trainer that pushes version 1 and is killed (-9) at a moment of its own choosing: CONFIG MODEL MOMENT."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch.distributed as dist
from safetensors.torch import load_file

from services.contract.config import Config
from services.contract.policy import PolicyBoard
from services.contract.store import connect
from services.trainer.publishing.collective import EngineGroup
from services.trainer.publishing.publish import Publisher
from tests.conftest import free_port


def main() -> None:
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{free_port()}", rank=0, world_size=1)  # as every trainer has
    config = Config.model_validate_json(Path(sys.argv[1]).read_text())
    board = PolicyBoard(connect(config.redis), config.run.name)
    publisher = Publisher(config, board, check_stop=lambda: None)
    moment, sent, send = sys.argv[3], [], EngineGroup.broadcast

    def broadcast(group: EngineGroup, flat: Any) -> None:
        if moment == ("before the second bucket" if sent else "before the first bucket"):
            os.kill(os.getpid(), signal.SIGKILL)
        sent.append(flat)
        send(group, flat)

    def commit(*_: object) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    setattr(EngineGroup, "broadcast", broadcast)  # noqa: B010 - a method is replaced on purpose
    setattr(board, "commit", commit)  # noqa: B010
    tensors = load_file(Path(sys.argv[2]) / "model.safetensors")
    publisher.publish(1, 0, lambda: iter(tensors.items()))


if __name__ == "__main__":
    main()
