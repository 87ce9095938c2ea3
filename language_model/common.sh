# Functions of the shell scripts beside this file, which source it: what the user appends to a script wins.
appended=("$@")

note() { echo "$(basename -- "$0"): $*" >&2; }
refuse() {
    echo "error: $*" >&2
    exit 2
}

# given FLAG...: whether one of these flags was appended, as --a_b V, --a_b=V, --a-b V or shortened; `value` is its last V.
given() {
    local index word name flag
    for ((index = ${#appended[@]} - 1; index >= 0; index--)); do
        word="${appended[index]}"
        name="${word#--}" name="${name%%=*}" name="${name//-/_}"
        if [[ "$word" != --?* ]]; then continue; fi
        for flag in "$@"; do
            if [[ "$flag" != "$name"* ]]; then continue; fi
            value="${appended[index + 1]-}"
            if [[ "$word" == *=* ]]; then value="${word#*=}"; fi
            return 0
        done
    done
    return 1
}

# is_on FLAG, is_off FLAG: whether this yes-or-no flag was appended, and with which meaning.
is_off() { given "$1" && [[ "$value" =~ ^([Ff]|[Ff][Aa][Ll][Ss][Ee]|[Nn]|[Nn][Oo]|0)$ ]]; }
is_on() { given "$1" && ! is_off "$1"; }

# data_flags DATASET VARIABLE...: `data`, the flags of DATASET and of the files that TRAIN_FILE, VALIDATION_FILE name.
data_flags() {
    local variable flag
    data=(--dataset_name "$1")
    for variable in "${@:2}"; do
        if [[ -z "${!variable:-}" ]]; then continue; fi
        if given dataset_name; then
            note "$variable is not used: --dataset_name was given"
            continue
        fi
        flag="--$(tr '[:upper:]' '[:lower:]' <<<"$variable")"
        data+=("$flag" "${!variable}")
    done
}

# bit_config_flag FLAG RIVAL...: `bits`, FLAG with BIT_CONFIG if that is set and no RIVAL was appended.
bit_config_flag() {
    bits=()
    if [[ -z "${BIT_CONFIG:-}" ]]; then return; fi
    if given "${@:2}"; then
        note "BIT_CONFIG is not used: other bits were given"
    else
        bits=("$1" "$BIT_CONFIG")
    fi
}

# own_folder VARIABLE FOLDER MARKER [SETTINGS]: make FOLDER, which VARIABLE names, or take one that an earlier call made
# for the same SETTINGS: it has the file MARKER. Other folders with content are refused. `folder` is its full path, and
# it is locked until this script and what it started have ended.
own_folder() {
    if [[ (-e "$2" || -L "$2") && ! -d "$2" ]]; then refuse "$1=$2: not a folder"; fi
    if [[ -d "$2" && ! -f "$2/$3" && -n "$(ls -A -- "$2")" ]]; then
        refuse "$1=$2 has content that is not of this script: set $1 to a new folder"
    fi
    mkdir -p -- "$2"
    folder="$(CDPATH= cd -- "$2" && pwd -P)"
    if [[ "$folder" == / || "$folder" == "$(cd ~ && pwd -P)" ]]; then refuse "$1=$2: set $1 to a new folder"; fi
    exec 9>>"$folder/$3"
    if command -v flock >/dev/null && ! flock --nonblock 9; then refuse "another run is at work in $1=$2"; fi
    if [[ -s "$folder/$3" && "$(cat "$folder/$3")" != "${4:-}" ]]; then
        refuse "$1=$2 holds results of other settings ($3): set another $1 or remove it"
    fi
    if [[ ! -s "$folder/$3" ]]; then printf '%s' "${4:-}" >&9; fi
}

# check_python: one message where python3 is not the one that has the requirements.
check_python() {
    python3 -c '
import sys

sys.path = [path for path in sys.path if path]  # not the current folder
import importlib.util

if sys.version_info < (3, 11):
    sys.exit(f"error: {sys.executable} is Python {sys.version.split()[0]}: 3.11 or newer is needed")
missing = [name for name in ("torch", "transformers", "datasets", "accelerate") if not importlib.util.find_spec(name)]
if missing:
    cure = "pip install -r requirements.txt, or put the python3 that has them first on PATH"
    sys.exit(f"error: {sys.executable} has no {missing[0]}: {cure}")' || exit 2
}

# count_processes: `gpus` and `nproc`, one process a GPU and one where there is none, or NPROC_PER_NODE.
count_processes() {
    check_python
    gpus="$(python3 -P -c 'import torch; print(torch.cuda.device_count())')"
    if is_on use_cpu; then gpus=0; fi
    nproc="${NPROC_PER_NODE-$((gpus > 0 ? gpus : 1))}"
    if [[ ! "$nproc" =~ ^[1-9][0-9]{0,3}$ ]]; then
        refuse "NPROC_PER_NODE=\"$nproc\": wanted is a number of processes, 1 or more"
    fi
    if ((gpus > 0 && nproc > gpus)); then
        refuse "NPROC_PER_NODE=$nproc: this machine has $gpus GPU(s), and each process needs one (--use_cpu: none)"
    fi
}

# launch SCRIPT FLAGS...: `nproc` processes of a script of this folder, with what was appended. -P: a file of the
# current folder is no module of python's.
launch() {
    python3 -P -c '
import sys
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main  # torchrun, but for its traceback: the process that failed has said why
try:
    main(sys.argv[1:])
except ChildFailedError:
    sys.exit(1)' --standalone --nproc_per_node="$nproc" "$here/$1" "${@:2}" ${appended[@]+"${appended[@]}"}
}
