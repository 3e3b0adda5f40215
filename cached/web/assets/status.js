"use strict";
// Fetches the page again and again, and changes what is different: scroll, focus and selection stay.
(() => {
  const EVERY_MS = 2000, PATIENCE_MS = 10000;
  const lost = document.getElementById("lost"), live = document.getElementById("live");
  let since = null, timer = 0, busy = false;

  const key = (node) => (node.nodeType === 1 && (node.id || node.dataset.key)) || "";
  const alike = (one, other) => one.nodeName === other.nodeName && key(one) === key(other);

  function patch(old, fresh) {
    if (old.nodeType !== 1) {
      if (old.nodeValue !== fresh.nodeValue) old.nodeValue = fresh.nodeValue;
      return;
    }
    const mine = (name) => old.nodeName === "DETAILS" && name === "open";
    for (const { name } of [...old.attributes]) if (!mine(name) && !fresh.hasAttribute(name)) old.removeAttribute(name);
    for (const { name, value } of fresh.attributes)
      if (!mine(name) && old.getAttribute(name) !== value) old.setAttribute(name, value);
    const keyed = new Map();
    for (const child of old.children) if (key(child)) keyed.set(key(child), child);
    let at = old.firstChild;
    for (const want of [...fresh.childNodes]) {
      const known = key(want) ? keyed.get(key(want)) : at;
      if (!known || !alike(known, want)) {
        old.insertBefore(document.importNode(want, true), at);
        continue;
      }
      if (known === at) at = at.nextSibling;
      else old.insertBefore(known, at);
      patch(known, want);
    }
    while (at) {
      const next = at.nextSibling;
      at.remove();
      at = next;
    }
  }

  function show(text) {
    const fresh = new DOMParser().parseFromString(text, "text/html");
    if (fresh.documentElement.dataset.made !== document.documentElement.dataset.made) return location.reload();
    for (const id of ["head", "main"]) patch(document.getElementById(id), fresh.getElementById(id));
    const icon = 'link[rel="icon"]';
    document.querySelector(icon).href = fresh.querySelector(icon).href;
    document.title = fresh.title;
    found();
  }

  function found() {
    since = null;
    lost.hidden = true;
    document.body.classList.remove("stale");
    live.textContent = "updated every 2 s";
  }

  function missed() {
    if (since) return;
    since = new Date();
    lost.querySelector("b").textContent = `The daemon is not reachable since ${since.toLocaleTimeString("en-GB")}.`;
    lost.hidden = false;
    document.body.classList.add("stale");
    document.title = `not reachable: ${document.title}`;
    live.textContent = "asking again every 2 s";
  }

  async function look() {
    if (busy) return;
    busy = true;
    try {
      const answer = await fetch(location.href, { cache: "no-store", signal: AbortSignal.timeout(PATIENCE_MS) });
      if (!answer.ok) throw new Error(answer.statusText);
      show(await answer.text());
    } catch {
      missed();
    } finally {
      busy = false;
    }
  }

  function run() {
    clearInterval(timer);
    if (document.hidden) return;
    look();
    timer = setInterval(look, EVERY_MS);
  }

  document.addEventListener("visibilitychange", run);
  live.textContent = "updated every 2 s";
  timer = setInterval(look, EVERY_MS);
  if (document.hidden) run();
})();
