// Fetches what a live page shows again now and then, and puts it in place of what is there.
"use strict";
(() => {
  const SLOWEST = 60000;
  if (!document.body.hasAttribute("data-live")) return;
  const status = document.querySelector(".live");
  const main = document.getElementById("content");
  const logs = () => [...main.querySelectorAll(".log")];
  // What is printed is followed more closely than lists.
  const usual = () => (logs().length > 0 ? 2000 : 5000);
  let pause = usual();
  const isBusy = () => {
    const within = document.activeElement;
    const selection = document.getSelection();
    return document.hidden
      || (within !== main && main.contains(within) && within.matches("input, select, textarea, button, summary"))
      || (selection && !selection.isCollapsed)
      || main.querySelector("details.confirm[open]");
  };
  const show = (text) => {
    status.hidden = false;
    if (status.textContent !== text) status.textContent = text;
  };
  const isAtEnd = (log) => log.scrollHeight - log.scrollTop - log.clientHeight < 8;
  const toEnd = (log) => { log.scrollTop = log.scrollHeight; };
  const replace = (next) => {
    const open = [...main.querySelectorAll("details[open][id]")].map((part) => part.id);
    const scrolled = logs().map((log) => (isAtEnd(log) ? null : log.scrollTop));
    const focused = main.contains(document.activeElement) ? document.activeElement.id : "";
    main.replaceChildren(...next.childNodes);
    for (const id of open) document.getElementById(id)?.setAttribute("open", "");
    logs().forEach((log, place) => {
      if (scrolled[place] == null) toEnd(log); else log.scrollTop = scrolled[place];
    });
    if (focused) document.getElementById(focused)?.focus({ preventScroll: true });
  };
  const load = async () => {
    if (isBusy()) return;
    try {
      const answer = await fetch(location.href, { credentials: "same-origin", cache: "no-store" });
      if (!answer.ok) throw new Error(String(answer.status));
      const page = new DOMParser().parseFromString(await answer.text(), "text/html");
      const next = page.getElementById("content");
      if (!next || isBusy()) return;
      if (main.innerHTML !== next.innerHTML) replace(next);
      document.title = page.title;
      pause = usual();
      show("Live");
      if (!page.body.hasAttribute("data-live")) {
        document.body.removeAttribute("data-live");
        show("Final");
      }
    } catch {
      pause = Math.min(pause * 2, SLOWEST);
      show("The scheduler does not answer; trying again");
    }
  };
  const round = async () => {
    await load();
    if (document.body.hasAttribute("data-live")) setTimeout(round, pause);
  };
  show("Live");
  logs().forEach(toEnd);
  setTimeout(round, pause);
  document.addEventListener("visibilitychange", () => { if (!document.hidden) load(); });
})();
