"""Request fields of vLLM's server that are not supported here: their harmless values, and why others are refused.

Supported fields are in the schemas.
Reference: https://docs.vllm.ai/en/latest/serving/openai_compatible_server.html ("Extra parameters")
"""

from __future__ import annotations

from typing import Any

Harmless = dict[str, tuple[Any, ...]]

SHARED: Harmless = {
    "allowed_token_ids": (),
    "bad_words": ([],),
    "detokenize": (True,),
    "include_stop_str_in_output": (False,),
    "kv_transfer_params": (),
    "logits_processors": ([],),
    "priority": (0,),
    "prompt_logprobs": (),
    "repetition_detection": (),
    "request_id": (),
    "return_token_ids": (False,),
    "return_token_offsets": (False,),
    "return_tokens_as_token_ids": (False,),
    "routed_experts_prompt_start": (0,),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True, False),  # none are shown
    "truncate_prompt_tokens": (),
    "truncation_side": (),
    "vllm_xargs": ({},),
    **{f"guided_{name}": () for name in ("json", "regex", "choice", "grammar", "decoding_backend")},
    "guided_whitespace_pattern": (),
    "structural_tag": (),
}
COMPLETION: Harmless = {
    "add_special_tokens": (True,),
    "prompt_embeds": (),
}
CHAT_PROMPT: Harmless = {  # how messages become a prompt; also in /tokenize
    "add_generation_prompt": (True,),
    "add_special_tokens": (False,),
    "chat_template": (),
    "chat_template_kwargs": ({},),
    "continue_final_message": (False,),
    "media_io_kwargs": ({},),
    "mm_processor_kwargs": ({},),
}
CHAT: Harmless = {
    **CHAT_PROMPT,
    "documents": ([],),
    "echo": (False,),
    "include_reasoning": (True, False),  # there is no reasoning to include
    "thinking_token_budget": (),
}

_FORMER = "replaced by structured_outputs, in vLLM's server and here"
_FORMAT = "prompts have the format with which the adapter was trained"
_TOOLS = "deprecated; send tools, tool_choice and turns with the role tool"
REASONS: dict[str, str] = {
    **dict.fromkeys((name for name in SHARED if name.startswith("guided_")), _FORMER),
    "structural_tag": "tags within free text are not supported; structured_outputs.grammar can describe a whole answer",
    "whitespace_pattern": "parts of JSON are separated by nothing, a space, or a line break with indentation",
    "disable_any_whitespace": "models use whitespace in JSON as they were trained to",
    "disable_additional_properties": "say so in the schema: additionalProperties: false",
    **dict.fromkeys((*CHAT_PROMPT, "documents", "reasoning_effort"), _FORMAT),
    **dict.fromkeys(("functions", "function_call"), _TOOLS),
    "tools": "send them with a chat; its usage includes the tokens that they add to the prompt",
    "name": "prompt formats do not support names; put the name into the content",
    "skip_special_tokens": "special tokens are never shown; logprobs name every token",
    "include_stop_str_in_output": "the stop text is never part of the answer",
    "request_id": "send it as the x-request-id header",
    "priority": "a busy engine is shared by tenant, not by request",
    "prompt_logprobs": "use echo with logprobs on /v1/completions",
    "truncate_prompt_tokens": "shorten the prompt before sending it",
    "allowed_token_ids": "use logit_bias",
    "bad_words": "use logit_bias",
    "logits_processors": "clients' code is not executed",
    "mm_processor_kwargs": "prompts are text",
    "media_io_kwargs": "prompts are text",
    "prompt_embeds": "send text or token ids",
}
