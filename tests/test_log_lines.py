import logging
import re

from tqdm import tqdm

from vflora import cli


def test_a_line_of_the_log_does_not_run_into_a_progress_bar(monkeypatch, capsys):
    monkeypatch.setattr(logging.root, "handlers", [])
    cli.start_logging()
    with tqdm(total=4, desc="training", mininterval=0) as bar:
        bar.update()
        logging.getLogger("vflora.train").warning("stopped after step 1")
    shown = re.split(r"[\r\n]", capsys.readouterr().err)
    assert "stopped after step 1" in shown
    assert shown[-2].startswith("training:  25%")
