"""Serve's log files survive an engine that sets up its own logging."""

from __future__ import annotations

import logging
import logging.config
from logging.handlers import MemoryHandler
from pathlib import Path

from serve_app.telemetry import log_files_kept


def test_serves_buffer_keeps_its_file_when_logging_is_set_up_anew(tmp_path: Path) -> None:
    file = logging.FileHandler(tmp_path / "replica.log")
    buffer = MemoryHandler(10, target=file)
    logger = logging.getLogger("ray.serve")
    logger.addHandler(buffer)
    try:
        with log_files_kept():
            logging.config.dictConfig({"version": 1, "disable_existing_loggers": False})
            assert buffer.target is None  # or nothing is shown here
        logger.warning("after it")
        buffer.flush()
    finally:
        logger.removeHandler(buffer)
        buffer.close()
        file.close()
    assert (tmp_path / "replica.log").read_text() == "after it\n"
