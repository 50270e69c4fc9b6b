// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
// The frame of every signed-in page: header, tree, page, task list; and the dialogs that the address opens.
import { AppShell, Burger, Group, Text } from '@mantine/core';
import { useDisclosure, useHotkeys, useLocalStorage } from '@mantine/hooks';
import { Link, Outlet, useNavigate } from '@tanstack/react-router';
import { lazy, Suspense, useEffect, useRef, useSyncExternalStore } from 'react';

import { useResources } from '../api/queries';
import { session } from '../api/session';
import { TaskDrawer } from '../tasks/TaskDrawer';
import { TaskPanel } from '../tasks/TaskPanel';
import { Tree } from '../tree/Tree';
import { Logo } from '../ui/Logo';
import { CreateMenu, SchemeMenu, UserMenu } from './HeaderMenus';
import { usePageSearch } from './navigation';
import { Shortcuts } from './Shortcuts';
import { ErrorNote } from './ErrorPage';

const Wizard = lazy(() => import('../wizard/Wizard').then((module) => ({ default: module.Wizard })));

/** Leaves for the sign-in form when the session ends, and remembers the place. */
function useSignedIn() {
  const current = useSyncExternalStore(session.subscribe, session.snapshot);
  const navigate = useNavigate();
  useEffect(() => {
    if (current) return;
    const next = location.pathname + location.search;
    void navigate({ to: '/signin', search: session.endReason && next !== '/' ? { next } : {}, replace: true });
  }, [current, navigate]);
  return current;
}

export function Shell() {
  const signedIn = useSignedIn();
  const [navOpen, nav] = useDisclosure(false);
  const [tasksOpen, setTasksOpen] = useLocalStorage({ key: 'atoll.tasks.open', defaultValue: true });
  const [helpOpen, help] = useDisclosure(false);
  const search = useRef<HTMLInputElement>(null);
  const [{ create, on, task }, change] = usePageSearch();
  const resources = useResources();

  useHotkeys([
    ['/', () => search.current?.focus()],
    ['shift+?', help.open],
    ['?', help.open],
    ['t', () => setTasksOpen((open) => !open)],
    ['shift+V', () => change({ create: 'vm' })],
    ['shift+C', () => change({ create: 'ct' })],
  ]);
  if (!signedIn) return null;
  return (
    <AppShell header={{ height: 44 }} navbar={{ width: 260, breakpoint: 'sm', collapsed: { mobile: !navOpen } }} footer={{ height: tasksOpen ? 190 : 33 }} padding={0}>
      <a href="#page" className="atoll-skip">
        Skip to the page
      </a>
      <AppShell.Header className="atoll-header">
        <Group gap="xs" wrap="nowrap">
          <Burger opened={navOpen} onClick={nav.toggle} hiddenFrom="sm" size="sm" aria-label="Show the tree" />
          <Link to="/" className="atoll-brand">
            <Logo size={22} />
            <Text fw={600} component="span">
              Atoll
            </Text>
          </Link>
        </Group>
        <Group gap={6} wrap="nowrap">
          <CreateMenu />
          <SchemeMenu />
          <UserMenu username={signedIn.username} onHelp={help.open} />
        </Group>
      </AppShell.Header>
      <AppShell.Navbar aria-label="Resources" onClick={navOpen ? nav.close : undefined}>
        <Tree searchRef={search} />
      </AppShell.Navbar>
      <AppShell.Main id="page" tabIndex={-1}>
        {resources.isError && <ErrorNote error={resources.error} title="The list of guests cannot be read" />}
        <Outlet />
      </AppShell.Main>
      <AppShell.Footer>
        <TaskPanel open={tasksOpen} onToggle={() => setTasksOpen((open) => !open)} />
      </AppShell.Footer>
      <TaskDrawer upid={task} onClose={() => change({ task: undefined })} />
      <Suspense>{create && <Wizard kind={create} node={on} onClose={() => change({ create: undefined, on: undefined })} />}</Suspense>
      <Shortcuts opened={helpOpen} onClose={help.close} />
    </AppShell>
  );
}
