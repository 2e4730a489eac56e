"""SNIPS, CLINC150 by domain, Banking77: which intent a short utterance has, as the packaged demo asks it.

The packaged rows are the demo's (short prompts, one word an intent). A directory with the public sources gives all
their rows, in the same words; of Banking77 either ten intents or all 77, which keep their names. The wording `template`
puts a text between "Text:" and "Intent:"; `bare` (first called `full`) leaves it alone, so that a prompt may end
anywhere; `system` is the template behind a system turn that lists the intents.
"""

import json
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

from pedro.data.demo import CHAT_TENANTS, demo_tenant
from pedro.data.row_shapes import parse_line
from pedro.data.tasks.parsers import parse_label
from pedro.data.tasks.sources import HubSource, Part, Record, read_csv, read_text
from pedro.data.tasks.task import Task, TaskRow, Wording

# The answer for each class of the source. First tokens differ within a task (in stories260K's vocabulary).
SNIPS = {
    "AddToPlaylist": "add",
    "BookRestaurant": "book",
    "GetWeather": "weather",
    "PlayMusic": "play",
    "RateBook": "rate",
    "SearchCreativeWork": "find",
    "SearchScreeningEvent": "movie",
}
CLINC150 = {
    "banking": "bank",
    "credit_cards": "card",
    "kitchen_and_dining": "kitchen",
    "home": "home",
    "auto_and_commute": "auto",
    "travel": "travel",
    "utility": "utility",
    "work": "work",
    "small_talk": "small talk",
    "meta": "meta",
}
BANKING77 = {
    "card_arrival": "delivery",
    "change_pin": "pin",
    "exchange_rate": "rate",
    "lost_or_stolen_card": "lost",
    "age_limit": "age",
    "terminate_account": "close",
    "apple_pay_or_google_pay": "wallet",
    "transfer_timing": "timing",
    "edit_personal_details": "edit",
    "getting_spare_card": "spare",
}
_BANKING77_NAMES = """
activate_my_card age_limit apple_pay_or_google_pay atm_support automatic_top_up
balance_not_updated_after_bank_transfer balance_not_updated_after_cheque_or_cash_deposit beneficiary_not_allowed
cancel_transfer card_about_to_expire card_acceptance card_arrival card_delivery_estimate card_linking
card_not_working card_payment_fee_charged card_payment_not_recognised card_payment_wrong_exchange_rate
card_swallowed cash_withdrawal_charge cash_withdrawal_not_recognised change_pin compromised_card
contactless_not_working country_support declined_card_payment declined_cash_withdrawal declined_transfer
direct_debit_payment_not_recognised disposable_card_limits edit_personal_details exchange_charge exchange_rate
exchange_via_app extra_charge_on_statement failed_transfer fiat_currency_support get_disposable_virtual_card
get_physical_card getting_spare_card getting_virtual_card lost_or_stolen_card lost_or_stolen_phone
order_physical_card passcode_forgotten pending_card_payment pending_cash_withdrawal pending_top_up
pending_transfer pin_blocked receiving_money Refund_not_showing_up request_refund reverted_card_payment?
supported_cards_and_currencies terminate_account top_up_by_bank_transfer_charge top_up_by_card_charge
top_up_by_cash_or_cheque top_up_failed top_up_limits top_up_reverted topping_up_by_card
transaction_charged_twice transfer_fee_charged transfer_into_account transfer_not_received_by_recipient
transfer_timing unable_to_verify_identity verify_my_identity verify_source_of_funds verify_top_up
virtual_card_not_working visa_or_mastercard why_verify_identity wrong_amount_of_cash_received
wrong_exchange_rate_for_cash_withdrawal
"""
BANKING77_ALL = {name: name.strip("?").replace("_", " ").lower() for name in _BANKING77_NAMES.split()}
PACKAGED = {"train": Part(("train.jsonl",)), "test": Part(("test.jsonl",))}


def make(record: Record, words: Wording, shots: str) -> TaskRow | None:
    """Intents that the task does not ask for are left out."""
    text, intent = " ".join(record["text"].split()), record["intent"]
    if not text or intent not in words.labels:
        return None
    return TaskRow(words.prompt({"text": text}, shots), words.label(intent), system=words.told({}))


def read_packaged(path: Path, intents: dict[str, str]) -> Iterator[Record]:
    """The demo's files, whatever their shape."""
    names = {word: intent for intent, word in intents.items()}
    with read_text(path) as stream:
        for number, line in enumerate(stream, 1):
            for example in parse_line(line, number):
                yield {"text": example.messages[-1]["content"], "intent": names[example.completion]}


def read_snips(path: Path) -> Iterator[Record]:
    if path.suffix == ".jsonl":
        yield from read_packaged(path, SNIPS)
        return
    raw = path.read_bytes()
    try:
        intents = json.loads(raw.decode())
    except UnicodeDecodeError:  # train_PlayMusic.json is published in Latin-1
        intents = json.loads(raw.decode("latin-1"))
    for intent, rows in intents.items():
        for row in rows:
            yield {"text": "".join(piece["text"] for piece in row["data"]), "intent": intent}


def read_clinc(path: Path) -> Iterator[Record]:
    """data_full.json has its splits in one file; `split` says which a record is of. Out-of-scope rows have none."""
    if path.suffix == ".jsonl":
        yield from read_packaged(path, CLINC150)
        return
    domains = json.loads(path.with_name("domains.json").read_text())
    domain_of = {intent: domain for domain, intents in domains.items() for intent in intents}
    for split, rows in json.loads(path.read_text()).items():
        for text, intent in rows:
            yield {"text": text, "intent": domain_of.get(intent, intent), "split": split}


def read_banking(path: Path, intents: dict[str, str] = BANKING77) -> Iterator[Record]:
    if path.suffix == ".jsonl":
        yield from read_packaged(path, intents)
        return
    for record in read_csv(path):
        yield {"text": record["text"], "intent": record["category"]}


def make_from_hub(record: Record, words: Wording, shots: str) -> TaskRow | None:
    """The hub's columns are `category` (SNIPS) or `label_text` (Banking77)."""
    intent = record.get("intent") or record.get("category") or record["label_text"]
    return make({"text": record["text"], "intent": intent}, words, shots)


def _wordings(intents: dict[str, str], what: str) -> dict[str, Wording]:
    """`full` is the bare text: the name is that of the first results, which keep it. `what` a text is asked for."""
    listed = ", ".join(intents.values())
    asked = f"{{text}}\nWhich intent is it: {listed}?\nAnswer:"
    instruction = f"Say which {what.lower()} the text has: {listed}."
    return {
        "full": Wording("{text}", intents),
        "asked": Wording(asked, intents),
        "template": Wording(f"Text: {{text}}\n{what}:", intents, instruction=instruction),
        "system": Wording(f"Text: {{text}}\n{what}:", intents, system=instruction),
    }


BARE_IS_FULL = {"bare": "full"}


SNIPS_TASK = Task(
    name="snips",
    title="SNIPS: 7 intents of voice commands",
    metric="accuracy",
    licence=demo_tenant("acme").licence,
    source="https://github.com/sonos/nlu-benchmark",
    wordings=_wordings(SNIPS, "Intent"),
    second_names=BARE_IS_FULL,
    make=make_from_hub,
    parser=parse_label,
    read=read_snips,
    layouts=({"train": Part(("train_*.json",)), "test": Part(("validate_*.json",))}, PACKAGED),
    hub=HubSource("benayas/snips", {"train": "train", "test": "test"}, rows={"train": 13084, "test": 1400}),
    packaged=demo_tenant("acme").train.parent,
    max_new_tokens=8,
    stops=("\n",),
)
CLINC_TASK = Task(
    name="clinc_domains",
    folder="clinc150",
    title="CLINC150: 10 domains of queries",
    metric="accuracy",
    licence=demo_tenant("globex").licence,
    source="https://github.com/clinc/oos-eval",
    wordings=_wordings(CLINC150, "Domain"),
    second_names=BARE_IS_FULL,
    make=make,
    parser=parse_label,
    read=read_clinc,
    layouts=(
        {
            "train": Part(("data_full.json",), only=("split", "train")),
            "validation": Part(("data_full.json",), only=("split", "val")),
            "test": Part(("data_full.json",), only=("split", "test")),
        },
        PACKAGED,
    ),
    packaged=demo_tenant("globex").train.parent,
    max_new_tokens=8,
    stops=("\n",),
)
BANKING_TASK = Task(
    name="banking77",
    title="Banking77: 10 of its intents",
    metric="accuracy",
    licence=demo_tenant("initech").licence,
    source="https://github.com/PolyAI-LDN/task-specific-datasets",
    wordings=_wordings(BANKING77, "Intent"),
    second_names=BARE_IS_FULL,
    make=make_from_hub,
    parser=parse_label,
    read=read_banking,
    layouts=({"train": Part(("train.csv",)), "test": Part(("test.csv",))}, PACKAGED),
    hub=HubSource("mteb/banking77", {"train": "train", "test": "test"}),
    packaged=demo_tenant("initech").train.parent,
    max_new_tokens=8,
    stops=("\n",),
)
BANKING_ALL_TASK = replace(
    BANKING_TASK,
    name="banking77_all",
    folder="banking77",
    title="Banking77: all 77 intents",
    wordings=_wordings(BANKING77_ALL, "Intent"),
    read=partial(read_banking, intents=BANKING77_ALL),
    packaged=CHAT_TENANTS[2].train.parent,
    max_new_tokens=16,
)
