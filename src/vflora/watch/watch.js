"use strict";
// Asks for the parts of the page again and again, and exchanges those that changed: videos that stay go on playing.
const main = document.querySelector("main");
const refresh = Number(main.dataset.refresh);
let mark = "", chosen = "", playing = !matchMedia("(prefers-reduced-motion: reduce)").matches;

const videos = () => [...document.querySelectorAll("video")];

function startClips() {
  const bar = document.getElementById("toggle");
  if (!bar) return;
  bar.textContent = playing ? "Pause" : "Play";
  const first = videos()[0];
  for (const video of videos()) {
    if (!playing) { video.pause(); continue; }
    if (video !== first && Math.abs(video.currentTime - first.currentTime) > 0.1) video.currentTime = first.currentTime;
    if (video.paused) video.play().catch(() => {}); // a browser may refuse, for example to save power; the next turn asks again
  }
}

function show(parts, marks) {
  for (const section of document.querySelectorAll("[data-part]")) {
    const name = section.dataset.part;
    if (section.dataset.mark === marks[name]) continue;
    section.innerHTML = parts[name];
    section.dataset.mark = marks[name];
  }
  startClips();
}

async function ask() {
  const answer = await fetch(`/state?mark=${mark}&step=${chosen}`, { cache: "no-store" });
  if (answer.status === 204) return;
  const state = await answer.json();
  mark = state.mark;
  show(state.parts, state.marks);
}

async function turn() {
  if (!document.hidden) {
    try { await ask(); document.body.classList.remove("lost"); } catch { document.body.classList.add("lost"); }
  }
  setTimeout(turn, refresh);
}

document.addEventListener("click", event => {
  if (event.target.id !== "toggle") return;
  playing = !playing;
  startClips();
});
document.addEventListener("input", event => {
  if (event.target.id !== "scrub") return;
  playing = false;
  startClips();
  for (const video of videos()) if (video.duration) video.currentTime = event.target.value / 1000 * video.duration;
});
document.addEventListener("change", event => {
  if (event.target.id !== "step") return;
  const newest = event.target.options[0].value;
  chosen = event.target.value === newest ? "" : event.target.value;
  mark = "";
  ask().catch(() => document.body.classList.add("lost"));
});
setInterval(() => {
  const scrub = document.getElementById("scrub"), first = videos()[0];
  if (playing && scrub && first && first.duration) scrub.value = 1000 * first.currentTime / first.duration;
}, 100);

turn();
