"""Is the Hugging Face hub there? Asked once for a name, with a limit: no network means one line within seconds."""

import urllib.error
import urllib.parse
import urllib.request
from functools import cache

from huggingface_hub import constants

from ..config import UserError

SECONDS = 8
HUB_MEND = "check the name, give a local folder or file instead, or set HF_HUB_OFFLINE=1 to use what was fetched before"


@cache
def hub_answers(kind: str, name: str) -> bool:
    """Does the hub know this name? kind: models or datasets. False in offline mode. No answer is a UserError."""
    if constants.HF_HUB_OFFLINE:
        return False
    url = f"{constants.ENDPOINT}/api/{kind}/{urllib.parse.quote(name)}"
    try:
        with urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=SECONDS):
            return True
    except urllib.error.HTTPError as error:
        if error.code in (400, 401, 403, 404):
            raise UserError(
                f"the hub has no {kind.removesuffix('s')} '{name}' that is open to all: {HUB_MEND}"
            ) from None
        what = f"it answers with error {error.code}"
    except (OSError, ValueError) as error:  # no network, no such host, a time-out, a proxy that talks nonsense
        what = f"no network, or no answer within {SECONDS} s ({getattr(error, 'reason', error)})"
    raise UserError(f"'{name}' is no local folder or file, and the hub can't be asked: {what}; {HUB_MEND}")
