"""Refusals in the form that OpenAI's clients read."""

from __future__ import annotations

from typing import Any


class ApiError(Exception):
    """Args:
    status: HTTP status.
    message: what is wrong and what would be right.
    code: short and stable, for programs.
    param: the key of the request it is about.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str,
        param: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.param, self.headers = status, message, code, param, headers

    def body(self) -> dict[str, Any]:
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        if self.status in (401, 429):
            kind = "authentication_error" if self.status == 401 else "rate_limit_error"
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}
