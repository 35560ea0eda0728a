"""The browser of the tests itself: what one page complains about is not held against the next."""

from http.server import BaseHTTPRequestHandler, HTTPServer
from threading import Thread

ASKS = "<script>setInterval(() => fetch('/more').catch(() => {}), 1)</script>"


class Page(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.send_header("Content-Type", "text/html")
        self.end_headers()
        self.wfile.write(ASKS.encode())

    def log_message(self, *_):
        pass


def test_a_page_whose_server_is_gone_does_not_complain_beside_the_next_one(browser, tmp_path):
    (tmp_path / "quiet.html").write_text("<p>quiet</p>")
    with HTTPServer(("127.0.0.1", 0), Page) as server:
        thread = Thread(target=server.serve_forever)
        thread.start()
        browser.open(f"http://127.0.0.1:{server.server_port}/", width=300, height=300)
        server.shutdown()
        thread.join()
    while not browser.complaints:
        browser.evaluate("1")
    browser.open(tmp_path / "quiet.html", width=300, height=300)
    assert browser.complaints == []
