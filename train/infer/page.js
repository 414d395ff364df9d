"use strict";
// One clock for everything: the sound that plays, or without one the time since the start.
const values = JSON.parse(document.getElementById("values").textContent);
const find = (id) => document.getElementById(id);
const timeline = find("timeline"), cursors = document.querySelectorAll(".cursor");
const slider = find("slider"), play = find("play"), clock = find("clock");
const sounds = [...document.querySelectorAll("audio")];
const canvases = [...document.querySelectorAll("canvas.video")];
const pictures = values.videos.map(() => new Map());
const stop = values.durationS;
let now = 0, isPlaying = false, sound = sounds[0] || null, startedAt = 0;

function picture(video, index) {
  if (!pictures[video].has(index)) {
    const image = new Image();
    image.onload = () => { if (frameAt(video) === index) drawFrame(video); };
    image.src = values.videos[video][index];
    pictures[video].set(index, image);
  }
  return pictures[video].get(index);
}

function frameAt(video) {
  return Math.min(Math.floor(now * values.frameRateHz + 1e-6), values.videos[video].length - 1);
}

function drawFrame(video) {
  const canvas = canvases[video], context = canvas.getContext("2d");
  const index = frameAt(video);
  const url = index < 0 ? null : values.videos[video][index];
  if (url === null) {
    context.fillStyle = "#808080";
    context.fillRect(0, 0, canvas.width, canvas.height);
    context.fillStyle = "#ffffff";
    context.fillText("no frame", 10, 20);
    return;
  }
  const image = picture(video, index);
  if (image.complete) context.drawImage(image, 0, 0, canvas.width, canvas.height);
  if (isPlaying && index + 3 < values.videos[video].length && values.videos[video][index + 3]) picture(video, index + 3);
}

function drawTexts() {
  values.texts.forEach((pair, row) => pair.forEach((events, which) => {
    const cell = find(`text-${row}-${which}`);
    if (!cell) return;
    const begun = events.filter(([start]) => start <= now + 1e-6);
    const last = begun[begun.length - 1];
    cell.textContent = last ? last[2] : "";
    cell.classList.toggle("over", !last || last[1] + 0.5 < now);
  }));
}

function draw() {
  canvases.forEach((_, video) => drawFrame(video));
  drawTexts();
  cursors.forEach((cursor) => { cursor.style.transform = `translateX(${now * values.pixelsPerS}px)`; });
  slider.value = now;
  clock.textContent = `${now.toFixed(2)} s`;
  play.textContent = isPlaying ? "❚❚" : "▶";
  play.setAttribute("aria-label", isPlaying ? "pause" : "play");
}

function follow() {
  const left = now * values.pixelsPerS - timeline.scrollLeft, width = timeline.clientWidth - 150;
  if (left < 0 || left > width) timeline.scrollLeft = Math.max(0, now * values.pixelsPerS - 40);
}

function seek(time) {
  now = Math.min(stop, Math.max(0, time));
  startedAt = performance.now() / 1000 - now;
  sounds.forEach((each) => { each.currentTime = now; });
  draw();
}

function start() {
  if (isPlaying) return;
  if (now >= stop - 0.01) seek(0);
  isPlaying = true;
  startedAt = performance.now() / 1000 - now;
  if (sound) {
    sound.currentTime = now;
    sound.play();
  }
  requestAnimationFrame(step);
}

function pause() {
  isPlaying = false;
  sounds.forEach((each) => each.pause());
  draw();
}

function step() {
  if (!isPlaying) return;
  const isAudible = sound && !sound.paused;
  now = isAudible ? sound.currentTime : performance.now() / 1000 - startedAt;
  if (!isAudible) startedAt = performance.now() / 1000 - now;
  if (now >= stop || (sound && sound.ended)) { now = Math.min(now, stop); pause(); return; }
  draw();
  follow();
  requestAnimationFrame(step);
}

function listenTo(chosen) {
  const wasPlaying = isPlaying;
  if (wasPlaying) pause();
  sound = chosen;
  if (wasPlaying) start();
}

sounds.forEach((each) => {
  each.addEventListener("play", () => {
    sounds.filter((other) => other !== each).forEach((other) => other.pause());
    if (Math.abs(each.currentTime - now) > 0.05) each.currentTime = now;
    sound = each;
    find(`listen-${sounds.indexOf(each)}`).checked = true;
    if (!isPlaying) { isPlaying = true; requestAnimationFrame(step); }
  });
  each.addEventListener("pause", () => { if (isPlaying && each === sound && !each.ended) pause(); });
  each.addEventListener("seeked", () => {
    if (!isPlaying && Math.abs(each.currentTime - now) > 0.02) seek(each.currentTime);
  });
});
document.querySelectorAll("input[name=listen]").forEach((radio) => radio.addEventListener("change", () => {
  listenTo(radio.value === "none" ? null : sounds[Number(radio.value)]);
}));
play.addEventListener("click", () => (isPlaying ? pause() : start()));
slider.addEventListener("input", () => { seek(Number(slider.value)); follow(); });
const plots = find("plots");
const seekTo = (event) => seek((event.clientX - plots.getBoundingClientRect().left) / values.pixelsPerS);
timeline.addEventListener("pointerdown", (event) => {
  if (event.target.closest("svg, img")) { seekTo(event); timeline.setPointerCapture(event.pointerId); }
});
timeline.addEventListener("pointermove", (event) => {
  if (event.buttons && timeline.hasPointerCapture(event.pointerId)) seekTo(event);
});
document.addEventListener("keydown", (event) => {
  const moves = { ArrowLeft: -0.1, ArrowRight: 0.1 };
  if (event.target.closest("audio, input[type=range]")) return;
  if (event.key === " ") { event.preventDefault(); (isPlaying ? pause : start)(); }
  if (event.key in moves) { event.preventDefault(); seek(now + moves[event.key]); follow(); }
});
seek(Number(new URLSearchParams(location.hash.slice(1)).get("t")) || 0);
follow();
