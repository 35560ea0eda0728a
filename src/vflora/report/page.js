"use strict";
// One clock drives every video. Only those near the window are decoded.
const player = document.querySelector(".player");
const frames = Number(player.dataset.frames), fps = Number(player.dataset.fps), length = frames / fps;
const [play, scrub, place, speed, scale] = ["play", "scrub", "place", "speed", "scale"].map(id => document.getElementById(id));
const near = new Set();
let playing = false, rate = 1, origin = 0, stamp = 0;

const clock = () => playing ? (origin + (performance.now() - stamp) / 1000 * rate) % length : origin;
const frameAt = time => Math.min(frames - 1, Math.floor(time * fps + 1e-4));

function setClock(time) { origin = time; stamp = performance.now(); }

function setPlaying(on) {
  setClock(clock());
  playing = on;
  player.classList.toggle("playing", on);
  play.setAttribute("aria-label", on ? "Pause" : "Play");
  if (!on) goTo(frameAt(origin));
}

function goTo(frame) { setClock(((frame % frames + frames) % frames) / fps); }

function load(video) {
  const bytes = Uint8Array.from(atob(video.nextElementSibling.textContent), c => c.charCodeAt(0));
  video.src = URL.createObjectURL(new Blob([bytes], { type: "video/mp4" }));
  video.load();
}

function follow(video, time) {
  if (video.readyState < 1 || video.seeking) return;
  if (!playing) {
    // on a busy machine the picture of a playing video is behind its time, and stays so when it is paused
    const behind = !video.paused;
    if (behind) video.pause();
    // the middle of a frame is that frame for every decoder
    const middle = (frameAt(time) + 0.5) / fps;
    if (behind || Math.abs(video.currentTime - middle) > 0.25 / fps) video.currentTime = middle;
    return;
  }
  if (video.playbackRate !== rate) video.playbackRate = rate;
  const late = Math.abs(video.currentTime - time);
  if (late > Math.max(0.1, 1.5 / fps) && !(video.ended && length - time < 0.1)) video.currentTime = time;
  // a browser may refuse to start a video, for example to save power; the next tick asks again
  if (video.paused && !(video.ended && length - time < 0.1)) video.play().catch(() => {});
}

function tick() {
  const time = clock(), frame = frameAt(time);
  if (Number(scrub.value) !== frame || place.value === "") scrub.value = frame;
  const label = `${frame + 1} / ${frames}`;
  if (place.value !== label) place.value = label;
  for (const video of near) follow(video, time);
  requestAnimationFrame(tick);
}

const watcher = new IntersectionObserver(entries => {
  for (const { target, isIntersecting } of entries) {
    if (isIntersecting) {
      if (!target.src) load(target);
      near.add(target);
    } else {
      near.delete(target);
      target.pause();
    }
  }
}, { rootMargin: "300px" });
document.querySelectorAll("video").forEach(video => watcher.observe(video));

function focusScale(value) {
  document.querySelectorAll("[data-for]").forEach(e => { e.hidden = e.dataset.for !== value; });
  document.querySelectorAll(".clip").forEach(e => e.classList.toggle("focus", e.dataset.scale === value));
}

play.addEventListener("click", () => setPlaying(!playing));
scrub.addEventListener("input", () => { const frame = Number(scrub.value); if (playing) setPlaying(false); goTo(frame); });
speed.addEventListener("change", () => { setClock(clock()); rate = Number(speed.value); });
scale.addEventListener("change", () => focusScale(scale.value));
document.addEventListener("keydown", event => {
  if (event.target.closest("input, select, button, summary, a")) return;
  if (event.key === " ") setPlaying(!playing);
  else if (event.key === "ArrowRight" || event.key === "ArrowLeft") {
    setPlaying(false);
    goTo(frameAt(clock()) + (event.key === "ArrowRight" ? 1 : -1));
  } else return;
  event.preventDefault();
});

document.getElementById("copy").addEventListener("click", async event => {
  const button = event.currentTarget, code = document.querySelector(".command code");
  const range = document.createRange();
  range.selectNodeContents(code);
  getSelection().removeAllRanges();
  getSelection().addRange(range);
  try { await navigator.clipboard.writeText(code.textContent); } catch { document.execCommand("copy"); }
  button.textContent = "Copied";
  setTimeout(() => { button.textContent = "Copy"; }, 1600);
});

requestAnimationFrame(tick);
if (!matchMedia("(prefers-reduced-motion: reduce)").matches) setPlaying(true);
