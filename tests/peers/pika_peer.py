"""The other side of an example: pika, RabbitMQ's client for Python.

    python3 pika_peer.py URL get QUEUE COUNT            takes messages, acknowledges them
    python3 pika_peer.py URL publish EXCHANGE KEY TEXT  waits for the confirm
    python3 pika_peer.py URL hear EXCHANGE KEY COUNT    binds a queue of its own
    python3 pika_peer.py URL ask QUEUE TEXT             a request, and its answer
    python3 pika_peer.py URL answer QUEUE COUNT         answers requests
"""

import sys
import time
import uuid

import pika

URL, VERB, *WORDS = sys.argv[1:]
# Longer than any test waits for it.
LIMIT = 60


def say(text):
    print(text, flush=True)


def text_of(body):
    return body.decode("utf-8", "replace")


def take(channel, queue, count):
    """Prints so many messages, each with its routing key."""
    messages = channel.consume(queue, inactivity_timeout=LIMIT)
    for _ in range(count):
        method, _properties, body = next(messages)
        if method is None:
            sys.exit(f"no message in {queue} within {LIMIT} s")
        say(f"{method.routing_key} {text_of(body)}")
        channel.basic_ack(method.delivery_tag)
    channel.cancel()


def publish(channel, exchange, key, text):
    """Raises if no queue takes it, or the broker does not confirm it."""
    channel.confirm_delivery()
    channel.basic_publish(
        exchange,
        key,
        text.encode(),
        pika.BasicProperties(delivery_mode=pika.DeliveryMode.Persistent),
        mandatory=True,
    )
    say("confirmed")


def hear(channel, exchange, key, count):
    queue = channel.queue_declare("", exclusive=True).method.queue
    channel.queue_bind(queue, exchange, key)
    say("bound")
    take(channel, queue, count)


def ask(connection, channel, queue, text):
    answers = channel.queue_declare("", exclusive=True).method.queue
    request = str(uuid.uuid4())
    found = []

    def on_answer(_channel, _method, properties, body):
        if properties.correlation_id == request:
            found.append(text_of(body))

    channel.basic_consume(answers, on_answer, auto_ack=True)
    properties = pika.BasicProperties(reply_to=answers, correlation_id=request)
    channel.basic_publish("", queue, text.encode(), properties)
    end = time.monotonic() + LIMIT
    while not found and time.monotonic() < end:
        connection.process_data_events(time_limit=0.1)
    say(found[0] if found else sys.exit("no answer"))


def answer(channel, queue, count):
    messages = channel.consume(queue, inactivity_timeout=LIMIT)
    say("ready")
    for _ in range(count):
        method, properties, body = next(messages)
        if method is None:
            sys.exit(f"no request in {queue} within {LIMIT} s")
        reply = pika.BasicProperties(correlation_id=properties.correlation_id)
        text = f"{text_of(body)} from Python"
        channel.basic_publish("", properties.reply_to, text.encode(), reply)
        channel.basic_ack(method.delivery_tag)
    channel.cancel()


def main():
    connection = pika.BlockingConnection(pika.URLParameters(URL))
    channel = connection.channel()
    channel.basic_qos(prefetch_count=1)
    if VERB == "get":
        take(channel, WORDS[0], int(WORDS[1]))
    elif VERB == "publish":
        publish(channel, *WORDS)
    elif VERB == "hear":
        hear(channel, WORDS[0], WORDS[1], int(WORDS[2]))
    elif VERB == "ask":
        ask(connection, channel, *WORDS)
    elif VERB == "answer":
        answer(channel, WORDS[0], int(WORDS[1]))
    else:
        sys.exit(__doc__)
    connection.close()


main()
