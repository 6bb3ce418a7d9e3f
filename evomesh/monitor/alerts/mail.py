"""Alerts as e-mail, over SMTP."""

from __future__ import annotations

import smtplib
import ssl
from collections.abc import Sequence
from email.message import EmailMessage

from evomesh.monitor.alerts.alert import Alert
from evomesh.monitor.alerts.http import TIMEOUT_S, DeliveryError, failure_words

# Where mail is submitted, by how the connection is protected.
_PORTS = {"starttls": 587, "tls": 465, "none": 25}


class EmailChannel:
    """Mail to some addresses.

    Args:
        server: ``HOST`` or ``HOST:PORT``.
        security: "starttls", "tls" from the first byte, or "none".
    """

    def __init__(
        self,
        server: str,
        sender: str,
        to: str | Sequence[str],
        user: str | None = None,
        password: str | None = None,
        security: str = "starttls",
    ) -> None:
        host, _, port = server.partition(":")
        self._host = host
        self._port = int(port) if port else _PORTS[security]
        self._sender = sender
        self._to = [to] if isinstance(to, str) else list(to)
        self._login = None if user is None else (user, password or "")
        self._security = security

    def send(self, alert: Alert) -> None:
        message = EmailMessage()
        # A line break in the name of a job would end the header.
        message["Subject"] = " ".join(alert.title.split())
        message["From"] = self._sender
        message["To"] = ", ".join(self._to)
        message.set_content(alert.body)
        try:
            with self._connect() as server:
                if self._login is not None:
                    server.login(*self._login)
                server.send_message(message)
        except smtplib.SMTPResponseException as error:
            is_final = error.smtp_code >= 500
            raise DeliveryError(
                f"the mail server answered {error.smtp_code}", is_final=is_final
            ) from None
        except smtplib.SMTPException as error:
            raise DeliveryError(_words(error)) from None
        except OSError as error:
            raise DeliveryError(failure_words(error)) from None

    def _connect(self) -> smtplib.SMTP:
        if self._security == "tls":
            return smtplib.SMTP_SSL(
                self._host,
                self._port,
                timeout=TIMEOUT_S,
                context=ssl.create_default_context(),
            )
        server = smtplib.SMTP(self._host, self._port, timeout=TIMEOUT_S)
        if self._security == "starttls":
            try:
                server.starttls(context=ssl.create_default_context())
            except (OSError, smtplib.SMTPException):
                server.close()
                raise
        return server


def _words(error: smtplib.SMTPException) -> str:
    """Return a reason without addresses, which smtplib's own sentences may repeat."""
    if isinstance(error, smtplib.SMTPRecipientsRefused):
        return "the mail server refused the receivers"
    if isinstance(error, smtplib.SMTPServerDisconnected):
        return "the mail server closed the connection"
    if isinstance(error, smtplib.SMTPNotSupportedError):
        return "the mail server does not support what security or user ask for"
    return type(error).__name__
