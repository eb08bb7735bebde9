"""A bad network: who gets an answer through it gets the right one, who is cut off is counted, others notice nothing."""

import http.client
import itertools
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from model.types import Pixels
from tests.reliability.gate import Figures, Work
from tests.support.bad_network import Weather, bad_network
from tests.support.load import Scrape, constantly
from tests.support.serving import server_process, wait_until
from tests.system.test_cross_talk import Answers, Question, questions, same
from tests.system.test_slow_clients import bear_rude_clients

CLIENTS = 32
FLAGS = ("--threads", "1", "--queue-capacity", "1000", "--upload-timeout-seconds", "60")
CUT_OFF = None


def through_bad_network(folder: Path, count: int, seed: int, weather: Weather) -> dict[str, int]:
    """Ask every question alone, then through the bad network, beside good clients on a good one."""
    asked = questions(count, seed)
    served = itertools.count()
    with (
        server_process(folder, *FLAGS) as server,
        bad_network(server.url, weather, seed) as network,
        ThreadPoolExecutor(CLIENTS) as pool,
    ):
        alone = [question.asked_alone(server.url) for question in asked]
        plain = asked[:8]

        def good(client: int) -> None:
            number = next(served) % len(plain)
            assert same(plain[number].asked_of(server.url), alone[number]), "a good client got another's answer"

        with constantly(4, good):
            got = list(pool.map(lambda question: through(network.url, question), asked))
        wait_until(lambda: Scrape(server.url)("http_requests_in_flight") == 1)
        outcomes = Scrape(server.url).by_label("retinaserve_requests_total", "outcome")
    wrong = [number for number, answer in enumerate(got) if answer is not CUT_OFF and not same(answer, alone[number])]
    cut_off = sum(answer is CUT_OFF for answer in got)
    assert wrong == []
    assert cut_off == network.resets, "a connection ended, and not by the weather"
    assert set(outcomes) <= {"ok", "cancelled", "invalid"}, outcomes
    return {"through_the_bad_network": count, "cut_off_by_it": cut_off, "good_requests": next(served)}


def through(url: str, question: Question) -> "Answers | Pixels | None":
    try:
        return question.asked_of(url)
    except (http.client.HTTPException, ConnectionError):
        return CUT_OFF


def run(work: Work) -> Figures:
    return through_bad_network(work.folder, work.count, work.first, Weather())


def run_rude(work: Work) -> Figures:
    """Units are times the short test's rude clients."""
    return {"good_requests": bear_rude_clients(work.folder, work.count), "rude_clients": 340 * work.count}
