"""The Auto classes know us after the import, and not by an import of theirs."""

import subprocess
import sys


def run(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)


def test_importing_the_package_imports_no_part_of_it() -> None:
    done = run(
        "import sys, lightning_crosslmm\n"
        "found = {name for name in sys.modules if name.startswith('lightning_crosslmm')}\n"
        "assert found == {'lightning_crosslmm', 'lightning_crosslmm.hf', 'lightning_crosslmm.hf.announce'}, found\n"
        "lightning_crosslmm.announce()\n"
        "assert sum(type(finder).__name__ == '_Announcer' for finder in sys.meta_path) == 1\n"
    )
    assert done.returncode == 0, done.stderr


def test_they_know_us_also_when_they_came_first_and_the_model_waits_for_a_configuration() -> None:
    done = run(
        "import sys\n"
        "from transformers import AutoConfig, AutoProcessor\n"
        "import lightning_crosslmm\n"
        "assert 'lightning_crosslmm.hf.processing' in sys.modules and 'lightning_crosslmm.model' not in sys.modules\n"
        "config = AutoConfig.for_model('crosslmm')\n"
        "assert type(config).__name__ == 'CrossLMMConfig' and 'lightning_crosslmm.model' in sys.modules\n"
        "from transformers import AutoModelForImageTextToText as Auto\n"
        "assert Auto._model_mapping[type(config)].__name__ == 'CrossLMMForConditionalGeneration'\n"
    )
    assert done.returncode == 0, done.stderr
