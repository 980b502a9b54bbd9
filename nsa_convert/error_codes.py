"""Every error code: exit status, meaning, what to do. Feeds `explain` and docs/reference/errors.md."""

from __future__ import annotations

import dataclasses

from nsa_convert.errors import UsageError
from nsa_convert.settings import suggest

EXIT_STATUS = {
    0: "done",
    1: "a fault of this package; please report it",
    2: "the command line or the output place is wrong",
    3: "bad input: checkpoint, config, data or recipe",
    4: "a check did not hold",
    5: "the machine: disk, memory, permission, missing package",
    6: "the Hub or the network",
    130: "interrupted by Ctrl-C; nothing half-written is left",
    143: "ended by a signal; nothing half-written is left",
}

AREAS = {
    "CK": "Checkpoint files",
    "CF": "Model configuration and settings",
    "TK": "Tokenizer files",
    "SV": "Writing, verifying and reverting",
    "RC": "Recipes and plans",
    "HB": "Hub",
    "CA": "Key/value caches",
    "KN": "Kernels",
    "TR": "Training",
    "EV": "Evaluation",
    "DA": "Texts and data",
    "CL": "Command line",
    "NC": "The package itself",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ErrorCode:
    """One stable code.

    Attributes:
        code: Two letters for the area, two digits.
        exit: Exit status; 0 for a warning.
        title: What it means.
        remedy: What to do.
    """

    code: str
    exit: int
    title: str
    remedy: str


def _table(*rows: tuple[str, int, str, str]) -> dict[str, ErrorCode]:
    return {row[0]: ErrorCode(code=row[0], exit=row[1], title=row[2], remedy=row[3]) for row in rows}


_AGAIN = "Fetch the checkpoint again, for example with `hf download ORG/NAME`."
_EDIT = "Correct the value in config.json, or fetch the file again."
_TRUST = "Do not use the checkpoint unless you know where it comes from."

ERROR_CODES: dict[str, ErrorCode] = _table(
    ("CK01", 3, "A weight file has 0 bytes.", _AGAIN),
    ("CK02", 3, "A weight file is cut off, or a GGUF file cannot be read.", _AGAIN),
    ("CK03", 3, "A weight file has bytes after its last tensor.", _AGAIN),
    ("CK04", 3, "A file is too small or its header too large to be safetensors.", _AGAIN),
    ("CK05", 3, "A safetensors header is not the JSON it should be.", _AGAIN),
    ("CK06", 3, "A safetensors header lists a name twice, or a value that JSON does not know.", _TRUST),
    ("CK07", 3, "Tensor offsets overlap, leave gaps, or do not fit the shape.", _TRUST),
    ("CK08", 3, "A weight file is a Git LFS pointer.", "Run `git lfs pull` in the checkpoint folder."),
    (
        "CK09",
        3,
        "A weight file is an HTML page, an error message, or not of the format its name says.",
        _AGAIN,
    ),
    ("CK10", 3, "Weight files are missing.", _AGAIN),
    ("CK11", 3, "The index names a file outside the checkpoint folder.", _TRUST),
    ("CK12", 3, "The index names an absolute path.", _TRUST),
    ("CK13", 3, "The index names a file whose name is no plain file name.", _TRUST),
    ("CK14", 3, "A file is a symlink that leaves the checkpoint folder.", "Copy the file into the folder."),
    ("CK15", 3, "A file is a symlink that leads nowhere or to itself.", _AGAIN),
    ("CK17", 3, "A weight file is a pipe, socket or device.", "Replace it by a regular file."),
    ("CK18", 3, "A weight file is a directory.", _AGAIN),
    ("CK19", 5, "A file may not be read.", "Give yourself read permission."),
    ("CK20", 3, "The index is not JSON or has no weight_map.", _AGAIN),
    ("CK21", 3, "The index and the weight files do not list the same tensors.", _AGAIN),
    (
        "CK22",
        0,
        "The index states another total size than the files have.",
        "Harmless; conversion corrects it.",
    ),
    (
        "CK23",
        3,
        "A tensor of the architecture is missing.",
        "Complete the download; nothing is ever made up.",
    ),
    ("CK24", 3, "A tensor does not belong to the architecture.", "--allow-extra-tensors keeps it untouched."),
    ("CK25", 3, "A tensor has another shape than config.json asks for.", _EDIT),
    ("CK26", 3, "A tensor has a dtype that is no floating-point weight.", "Dequantise the checkpoint first."),
    ("CK27", 3, "A tensor holds NaN or infinity.", "The model is damaged; fetch it again."),
    (
        "CK28",
        0,
        "A tensor is all zero, the same everywhere, or has very large values.",
        "Check that the model works before converting.",
    ),
    ("CK29", 4, "A file differs from the manifest written at conversion.", "Convert the source again."),
    ("CK30", 3, "Weight files were swapped, mixed or exchanged.", _AGAIN),
    ("CK31", 3, "There are only pickled weights, which can run code.", "See `convert --allow-pickle`."),
    ("CK32", 3, "A pickle holds more than tensors, or is damaged.", _TRUST),
    ("CK33", 0, "Pickled weights lie beside safetensors weights.", "The pickled ones are ignored."),
    (
        "CK34",
        0,
        "An index lies beside a single weight file.",
        "The single file is used, as transformers does.",
    ),
    ("CK35", 3, "The checkpoint is already converted.", "Use it as it is, or `nsa-convert revert` it first."),
    ("CK36", 3, "The checkpoint is quantised.", "Convert the original weights, or dequantise and save them."),
    ("CK37", 3, "This is an adapter or a distributed training checkpoint.", "Merge or export it first."),
    ("CK39", 3, "A weight file changed while it was read.", "Run again when nothing writes to the source."),
    ("CK40", 0, "lm_head is stored although the embeddings are tied.", "Harmless; transformers ignores it."),
    ("CF01", 3, "A head count is not a positive whole number.", _EDIT),
    ("CF02", 3, "Key/value heads do not divide the query heads.", _EDIT),
    ("CF03", 3, "The hidden size is no multiple of the heads and head_dim is not given.", _EDIT),
    ("CF04", 3, "The number of layers is not that of the weights.", _EDIT),
    ("CF06", 3, "A size or token id is out of range.", _EDIT),
    ("CF07", 3, "head_dim is not possible.", _EDIT),
    (
        "CF09",
        3,
        "RoPE or sliding-window settings are wrong or not supported.",
        "Choose a model whose layers see the whole context.",
    ),
    ("CF10", 3, "A number in config.json is out of range.", _EDIT),
    ("CF11", 3, "tie_word_embeddings contradicts the stored tensors.", _EDIT),
    ("CF12", 3, "The architecture is not supported.", "`nsa-convert methods` and the README list what is."),
    ("CF13", 3, "A key is not known.", "Take the name that the message suggests."),
    ("CF14", 0, "config.json names custom code.", "It is neither run nor copied."),
    ("CF15", 0, "config.json chooses an attention implementation.", "It is dropped; nothing is fetched."),
    ("CF17", 3, "A configuration file is not a JSON object in UTF-8.", _AGAIN),
    ("CF18", 3, "A configuration file is too big, nested too deeply, or holds too many values.", _TRUST),
    ("CF19", 3, "A JSON file lists a key twice, or holds NaN or Infinity.", _EDIT),
    ("CF20", 3, "A value has the wrong type.", _EDIT),
    ("CF21", 3, "The dtype in config.json is not known.", _EDIT),
    (
        "CF22",
        3,
        "Settings have values they cannot have, or do not fit together.",
        "Take values as the message asks.",
    ),
    ("CF24", 3, "There is no checkpoint at this place.", "Check the path; a Hub id looks like ORG/NAME."),
    ("CF25", 3, "A method cannot read this prompt as it arrives.", "Read prompts whole and pad on the left."),
    (
        "TK01",
        3,
        "There is no tokenizer, or it cannot be read.",
        "Copy the tokenizer files of the source there.",
    ),
    (
        "TK02",
        3,
        "The tokenizer knows more tokens than the embeddings have rows.",
        "Use the model's own tokenizer.",
    ),
    ("TK03", 3, "tokenizer_config.json names a file outside the folder.", _TRUST),
    ("TK04", 3, "The chat template is missing, fails, or takes too much.", "Give the prompt as plain text."),
    ("TK06", 0, "generation_config.json is not valid.", "It is copied as it is."),
    ("SV02", 5, "There is not enough free space.", "Free some space or choose another disk."),
    ("SV03", 5, "Writing failed.", "Free space or quota, check the disk, and run again."),
    ("SV04", 2, "Source and output overlap.", "Choose an output folder outside the source."),
    ("SV05", 2, "The output place is taken.", "Choose another one, or --overwrite a checkpoint."),
    ("SV07", 5, "There is not enough memory.", "Close other programs or use a bigger machine."),
    ("SV13", 4, "The converted model was changed and cannot be reverted.", "Take the original checkpoint."),
    ("SV14", 3, "File names differ only in case.", "Rename the shards and the entries of the index."),
    ("SV15", 5, "Permission is missing.", "Choose a place you may write to, or change its permissions."),
    ("SV16", 2, "Another process is writing the same output.", "Wait for it to end."),
    ("SV17", 3, "The folder was not written completely by this package.", "Convert the source again."),
    (
        "SV18",
        4,
        "Kept tensors differ from the source.",
        "Convert the source again; check which source was meant.",
    ),
    (
        "SV19",
        4,
        "With a full budget the model is not the dense model.",
        "Report it with the numbers of the message.",
    ),
    (
        "SV20",
        4,
        "The folder does not load without this package.",
        "See the message; check the transformers version.",
    ),
    ("RC01", 3, "A YAML file cannot be read.", "Correct the line that the message names."),
    ("RC02", 3, "A method is not known.", "`nsa-convert methods` lists them."),
    ("RC05", 3, "Text in a YAML file needs quotes.", "Write it as the message shows."),
    ("RC10", 3, "Layers or settings of a plan are wrong.", "Take values as the message asks."),
    ("RC08", 3, "Keys or values of a recipe are wrong.", "docs/reference/recipes.md lists all keys."),
    ("RC09", 3, "A recipe does not fit its model or its data.", "Correct what the message names."),
    ("RC11", 3, "A recipe contradicts its checkpoint.", "Leave sparse_attention out."),
    ("RC12", 3, "A recipe file or its base is missing, too big or not text.", "Check the path."),
    ("RC14", 3, "A recipe holds a token.", "Remove it; set HF_TOKEN in the environment."),
    ("TR05", 0, "A checkpoint is incomplete.", "It is passed over; the one before it is used."),
    ("TR06", 3, "No checkpoint of a stage is whole.", "Remove the stage's folder to begin the stage again."),
    ("TR04", 5, "A checkpoint could not be written.", "Free some space, then --resume."),
    ("TR08", 3, "The optimizer's state in a checkpoint is not finite.", "Remove the checkpoint; --resume."),
    ("TR09", 4, "A loss or a gradient is not finite.", "Lower the learning rate and --resume."),
    ("TR10", 4, "A run diverged or does not learn.", "Lower the learning rates, or --set alarms=warn."),
    ("TR11", 5, "Training needs more memory than there is.", "Set checkpointing, or a smaller micro_batch."),
    ("TR12", 3, "A checkpoint belongs to another run.", "Take the same recipe, or another out."),
    ("TR13", 3, "A state file of a checkpoint holds code.", "Do not trust the run; nothing was executed."),
    ("TR15", 2, "The place for a run is taken.", "--resume it, or choose another out."),
    ("TR16", 4, "The gates of a layer are shut.", "Lower lr_new; --set alarms=warn goes on."),
    ("TR17", 1, "A weight that is not trained changed.", "Report it."),
    ("TR18", 0, "A service that draws curves failed.", "Training goes on; log.jsonl has all values."),
    ("TR20", 5, "A kernel cannot be compiled here.", "--resume --allow-eager-fallback runs plain torch."),
    ("HB01", 6, "The Hub refused access.", "`hf auth login`, and accept the model's terms on its page."),
    ("HB02", 6, "The token may not write there.", "Take a token with write access to this owner."),
    (
        "HB03",
        6,
        "The Hub does not know this repository or revision.",
        "Check the id; a local folder needs its path.",
    ),
    ("HB04", 6, "The Hub gave an answer that cannot be understood.", "Try again later."),
    ("HB05", 6, "The repository changed during the push.", "Run the push again."),
    ("HB06", 6, "The Hub asks to wait.", "Try again later; what was uploaded is not sent again."),
    ("HB07", 6, "The Hub failed.", "Try again later; nothing was published."),
    ("HB09", 6, "A file is too large for the Hub.", "Save the model in smaller shards."),
    ("HB10", 6, "The network failed.", "Try again; what was transferred is not repeated."),
    (
        "HB12",
        6,
        "Offline mode is set and the model is not in the cache.",
        "Unset HF_HUB_OFFLINE or give a folder.",
    ),
    ("HB13", 3, "A file holds a token or a path of this machine.", "Remove it, then push again."),
    ("HB15", 3, "There is no valid model card.", "`nsa-convert card MODEL` writes one."),
    ("HB16", 3, "The licence of the source is not known.", "Name it with --license."),
    ("HB17", 6, "Files at the Hub differ from those sent.", "Push again."),
    ("HB20", 4, "Verification failed before a push.", "Convert again, or --allow-unverified."),
    ("HB21", 4, "There is no evaluation of these files.", "`nsa-convert eval MODEL --out MODEL/evaluation`."),
    ("HB22", 3, "A downloaded file is not what the Hub declared.", "Run again: it is fetched anew."),
    (
        "CA01",
        3,
        "A cache lacks what this model needs beside keys and values.",
        "Read the prompt again with this model, from an empty cache.",
    ),
    ("CA02", 3, "A cache of this kind cannot serve this model.", "Take the default dynamic cache."),
    ("KN14", 5, "A kernel backend cannot run here.", "`nsa-convert doctor` shows what can."),
    ("EV01", 3, "A length is too short, or beyond the model's positions.", "Give one as the message asks."),
    ("EV02", 3, "A prompt cannot be built at this length.", "Raise the length."),
    ("EV04", 4, "The model's logits are not finite.", "`nsa-convert verify` the model."),
    ("EV07", 3, "The models cannot be compared.", "Compare with the dense model it was converted from."),
    (
        "EV11",
        3,
        "An lm-eval task would run code of the model's repository.",
        "`--suite long` has these tasks and runs none.",
    ),
    ("EV12", 5, "The default text is not available in this Python.", "Give a text file of your own."),
    ("EV14", 3, "lm-eval does not know a task.", "`lm-eval ls tasks` lists them."),
    ("EV15", 3, "A method cannot be scored in one pass.", "Take --suite quick or long."),
    ("EV13", 3, "A report is damaged or not one of `nsa-convert eval`.", "Run the evaluation again."),
    ("DA01", 3, "A text cannot be read or is empty.", "Check the path; the file must be UTF-8."),
    ("DA02", 3, "A text is too short, or a line is not JSON.", "See the message; correct the line it names."),
    ("DA03", 3, "A document is not UTF-8 text.", "Correct it, or set skip_bad in the source."),
    ("DA04", 3, "A data column is missing, empty or not text.", "Name the right column."),
    ("DA06", 3, "The data hold less than one optimizer step.", "Add data or lower batch_tokens."),
    ("DA07", 3, "A data file or data set cannot be read.", "Fetch it again."),
    (
        "DA08",
        3,
        "The training data changed since the checkpoint.",
        "Put the same files back, or --allow-data-change.",
    ),
    ("DA09", 3, "The tokenizer knows more tokens than the model.", "Use the model's own tokenizer."),
    ("DA12", 5, "Processes that read the data died.", "Free memory, or set workers: 0; then --resume."),
    ("DA14", 3, "A data set is a program.", "Take one of plain files; programs are not run."),
    (
        "CL02",
        2,
        "A command, option or argument is wrong.",
        "`nsa-convert COMMAND --help` lists what there is.",
    ),
    ("CL03", 2, "An option has a value it cannot have.", "`nsa-convert COMMAND --help` lists the values."),
    ("CL11", 5, "An optional package is missing.", "Install it with the pip line of the message."),
    (
        "NC01",
        1,
        "Something unexpected happened inside the package.",
        "Report it with the traceback file that the message names; --debug shows the traceback.",
    ),
)


def explain_code(code: str) -> ErrorCode:
    """Return what a code means.

    Raises:
        UsageError: There is no such code.
    """
    known = code.upper()
    if known not in ERROR_CODES:
        raise UsageError(f"unknown code '{code}'{suggest(known, ERROR_CODES)}", code="CL02", found=code)
    return ERROR_CODES[known]


def render_markdown() -> str:
    """Return docs/reference/errors.md."""
    lines = ["# Errors", "", "<!-- Written by nsa_convert.error_codes.render_markdown; do not edit. -->", ""]
    lines += ["Every error carries a code; `nsa-convert explain CODE` prints its line of these tables.", ""]
    lines += ["| exit | meaning |", "|---|---|", *(f"| {k} | {v} |" for k, v in EXIT_STATUS.items())]
    for prefix, title in AREAS.items():
        lines += ["", f"## {title}", "", "| code | exit | meaning | what to do |", "|---|---|---|---|"]
        for entry in ERROR_CODES.values():
            if entry.code.startswith(prefix):
                status = entry.exit if entry.exit else "warning"
                lines.append(f"| {entry.code} | {status} | {entry.title} | {entry.remedy} |")
    return "\n".join(lines) + "\n"
