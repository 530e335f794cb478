"""What is answered in the step in which it came goes out in that step."""

from typing import Any
from unittest.mock import Mock

from async_cache.protocol import messages
from async_cache.protocol.connection import Connection
from async_cache.protocol.frames import frame
from async_cache.protocol.messages import Decoder, encode


async def test_answers_to_what_came_together_go_out_together_and_no_turn_later() -> None:
    connection: Connection

    def answer(message: Any) -> None:
        connection.send(messages.Done(message.number))

    connection = Connection(Decoder(messages.Request), answer, lambda error: None)
    transport = Mock()
    connection.connection_made(transport)
    connection.data_received(b"".join(frame(encode(messages.Ping(number))) for number in (1, 2, 3)))
    expected = b"".join(frame(encode(messages.Done(number))) for number in (1, 2, 3))
    transport.write.assert_called_once_with(expected)
