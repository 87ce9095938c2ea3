"""What every script begins and ends with: its log, and its errors."""

import contextlib
import logging
import sys
import warnings

import datasets
import transformers
from torch import distributed
from transformers.utils.versions import require_version

from common.record import hide_tokens
from models.disk import is_disk_error
from models.errors import UserError

require_version("transformers>=5.23", "pip install -r requirements.txt")


def setup_logging(training_args):
    """INFO on rank 0, warnings elsewhere."""
    level = logging.INFO if training_args.process_index == 0 else logging.WARNING
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s", datefmt="%H:%M:%S", level=level)
    for name in ("httpx", "datasets", "bitsandbytes", "evaluate"):
        logging.getLogger(name).setLevel(logging.WARNING)
    transformers.utils.logging.set_verbosity_warning()
    logging.getLogger("bitsandbytes.autograd").setLevel(logging.ERROR)  # warns of float16 in every forward
    # Evaluation leaves the mask out on purpose (`trainer_qa.prediction_step`); upstream warns of every padded batch.
    upstream = logging.getLogger("transformers.modeling_utils")
    upstream.addFilter(lambda record: "may be padded" not in record.getMessage())
    warnings.filterwarnings("ignore", message=".*pin_memory.*")  # of torch, on machines without a GPU
    warnings.filterwarnings("ignore", message=".*null_placement.*")  # of pyarrow, raised inside datasets
    if training_args.process_index != 0:
        transformers.utils.logging.disable_progress_bar()
        datasets.disable_progress_bars()


@contextlib.contextmanager
def plain_errors():
    """What a user or a disk did ends the script with one message; any other error shows its traceback."""
    try:
        yield
    except Exception as error:
        if not (isinstance(error, UserError | FloatingPointError) or is_disk_error(error)):
            raise
        sys.exit(hide_tokens(f"error: {error}"))
    if distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()  # its threads, alive at the exit, can abort a process that is done
